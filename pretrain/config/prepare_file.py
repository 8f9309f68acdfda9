"""Settings of `epochal data prepare`: from its options or from a YAML file, never from both.

With two places for one value it would not be clear which one is used. So options in addition to a
file are refused, except for the output folder and the number of processes.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from data_pipeline.corpus.source import SourceSettings
from data_pipeline.errors import DataError
from data_pipeline.prepare.settings import PrepareSettings, TokenizerSettings
from pretrain.config.messages import describe_all
from pretrain.config.yaml_file import read_mapping

BESIDE_A_FILE = ("out", "workers", "settings", "as_json")
"""Options that are allowed together with a settings file."""


def known_settings() -> list[str]:
    """List every dotted key of a settings file."""
    return [
        *PrepareSettings.model_fields,
        *(f"sources.{name}" for name in SourceSettings.model_fields),
        *(f"tokenizer.{name}" for name in TokenizerSettings.model_fields),
    ]


def default_out(sources: Iterable[str] | None) -> Path:
    """Default folder of a pool: the one that `data=builtin` or `data=pool` reads."""
    return Path("data/builtin" if set(sources or ["builtin"]) == {"builtin"} else "data/pool")


def settings_of(values: dict[str, Any]) -> PrepareSettings:
    """Validate settings; raises DataError with a line for each problem."""
    try:
        return PrepareSettings.model_validate(values)
    except ValidationError as error:
        lines = "\n  ".join(describe_all(error, known_settings(), "docs/data.md"))
        raise DataError(f"settings of the preparation: {lines}") from None


def read_settings(
    path: Path, out: Path | None, workers: int | None, given: Iterable[str]
) -> PrepareSettings:
    """Read settings from a YAML file; `given` are the names of the options on the command line."""
    refused = [f"--{name.replace('_', '-')}" for name in given if name not in BESIDE_A_FILE]
    if refused:
        raise DataError(
            f"{', '.join(refused).replace('--sources', 'SOURCES')} cannot be given with --settings "
            f"{path}, because the file holds all settings; write them there, or leave --settings "
            "out"
        )
    values = read_mapping(path, "docs/data.md shows one (sources, tokenizer, ...)")
    values = {"out": default_out(None), **values}
    chosen = {"out": out, "workers": workers}
    values |= {name: value for name, value in chosen.items() if value is not None}
    return settings_of(values)
