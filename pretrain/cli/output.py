"""Output of every command: a JSON object for machines; aligned lines, or a red one, for people."""

from __future__ import annotations

import json
import re
import sys
from typing import Annotated, Any

import typer

from pretrain.config.secrets import redacted

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object for machines.")]

_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]|\r(?!\n)")


def print_json(value: object) -> None:
    """Print a plain value as JSON and flush."""
    json.dump(value, sys.stdout, indent=1)
    print(flush=True)


def print_values(values: dict[str, Any]) -> None:
    """Print one aligned line for each value that is not None, and one for each of `parts`.

    Fractions have five digits, counts have thousands separators.
    """
    parts = values.get("parts") or {}
    rows = {k: v for k, v in {**values, **parts}.items() if k != "parts" and v is not None}
    width = max(len(key) for key in rows)
    for key, value in rows.items():
        text = f"{value:,}" if type(value) is int else value
        print(f"{key:<{width}}  {f'{value:.5g}' if isinstance(value, float) else text}")


def visible(text: str) -> str:
    """Text with control characters escaped, so that no text steers the terminal that shows it.

    Line ends and tabs stay.
    """
    return _CONTROL.sub(lambda found: ascii(found[0])[1:-1], text)


def print_red(text: str) -> None:
    """Print on standard error, without line breaks, so that the text can be searched for."""
    from rich.console import Console
    from rich.text import Text

    Console(stderr=True, soft_wrap=True).print(Text(visible(text), style="red"))


def print_error(error: Exception, code: int) -> None:
    """Print a user error, as JSON where the command line asks for it."""
    if "--json" in sys.argv:
        print_json({"error": redacted(str(error)), "type": type(error).__name__, "exit_code": code})
    else:
        print_red(f"error: {redacted(str(error))}")
