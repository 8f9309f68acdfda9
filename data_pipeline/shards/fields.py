"""Types of the fields of manifests and mixes, which may come from anybody, and their JSON.

A field that is joined to a path, allocated or divided by is limited here, so that code behind a
parsed manifest need not distrust it.
"""

from __future__ import annotations

import json
from typing import Annotated, Any

from pydantic import AfterValidator, Field, StringConstraints, ValidationError

from data_pipeline.shards.files import check_name

LARGEST = 2**53
"""Largest count: every JSON reader has it exactly."""
LARGEST_VOCABULARY = 2**24
MANIFEST_BYTES = 64 << 20
"""Largest manifest or mix: 2.5 million members of 1 MiB, so 1.3e12 tokens of two bytes."""
CONTAINERS = 1_000_000
"""Objects and arrays in one file; 64 MiB of nothing else would take 5 GB of memory."""
_SHOWN = 5
"""Problems that a message lists."""

FileName = Annotated[str, AfterValidator(check_name)]
Sha256 = Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$")]
Xxh3 = Annotated[str, StringConstraints(pattern="^[0-9a-f]{32}$")]
"""xxh3-128."""
ShortXxh3 = Annotated[str, StringConstraints(pattern="^[0-9a-f]{16}$")]
"""xxh3-64."""
Count = Annotated[int, Field(strict=True, ge=0, le=LARGEST)]
Positive = Annotated[int, Field(strict=True, ge=1, le=LARGEST)]
VocabSize = Annotated[int, Field(strict=True, ge=1, le=LARGEST_VOCABULARY)]


def check_printable(text: str) -> str:
    """Return `text`; ValueError where it holds NUL, control or invisible characters."""
    if not text.isprintable():
        raise ValueError("it holds NUL, control or invisible characters")
    return text


def load_json(text: str) -> Any:
    """Parse JSON that may come from anybody; ValueError also for one that is nested too deeply."""
    if text.count("{") + text.count("[") > CONTAINERS:
        raise ValueError(f"it holds more than {CONTAINERS:,} objects and arrays")
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def describe(error: ValidationError) -> str:
    """One line for each of the first problems, with its place; values are not repeated."""
    found = error.errors(include_url=False, include_context=False, include_input=False)
    lines = [
        ".".join(map(str, p["loc"]))
        + (": " if p["loc"] else "")
        + p["msg"].removeprefix("Value error, ")
        for p in found[:_SHOWN]
    ]
    more = [f"and {len(found) - _SHOWN} more"] if len(found) > _SHOWN else []
    return "\n  ".join(["", *lines, *more])
