"""Messages for errors that pydantic finds: one line with the path, the given and allowed values.

The text of pydantic names classes and links to its documentation. A user needs the key and the
values that it takes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from pretrain.config.suggest import closest

if TYPE_CHECKING:
    from pydantic import ValidationError


def describe_all(error: ValidationError, known: Iterable[str], reference: str = "") -> list[str]:
    """Describe every problem of `error` once, sorted; `known` are all dotted keys.

    `reference` names the document that lists the keys.
    """
    keys = list(known)
    return sorted({_describe(problem, keys, reference) for problem in error.errors()})


def unknown_key(key: str, known: Iterable[str], reference: str = "") -> str:
    """Message for a key that does not exist."""
    hint = closest(key, known)
    if hint:
        return f"unknown key {key}; did you mean {hint}?"
    return f"unknown key {key}" + (f"; see {reference}" if reference else "")


def _describe(problem: Any, known: list[str], reference: str) -> str:
    path = ".".join(str(part) for part in problem["loc"])
    kind, given = problem["type"], problem["input"]
    if kind == "extra_forbidden":
        # A key of an entry of a list (sources.0.name) is known without the number.
        plain = ".".join(str(part) for part in problem["loc"] if not isinstance(part, int))
        return unknown_key(plain, known, reference)
    if kind == "missing" or given == "???":
        choose = "choose data=... or " if path.startswith("data.") else ""
        return f"{path}: no value given; it is required ({choose}set {path}=...)"
    reason = problem["msg"].removeprefix("Value error, ")
    if kind in ("value_error", "assertion_error"):
        says_where = not path or reason.startswith((path, "unknown "))
        return reason if says_where else f"{path}: {reason}"
    if kind == "model_type":
        return f"{path}: given {given!r}, but it is a section; set {path}.KEY=VALUE"
    if kind == "tuple_type":
        reason = "a list, e.g. [0.1,0.9]"
    if kind == "int_parsing_size":
        reason = "a whole number of at most 18 digits"
    reason = reason.removeprefix("Input should be ").removeprefix("a valid ")
    return f"{path}: given {given!r}, allowed: {reason}"
