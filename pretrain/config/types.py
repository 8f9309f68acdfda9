"""Base class of all sections of settings, and the types of their fields."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PlainValidator

PositiveInt = Annotated[int, Field(ge=1, le=2**62)]
LayerCount = Annotated[int, Field(ge=1, le=100_000)]
Width = Annotated[int, Field(ge=1, le=2**24)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
OpenFraction = Annotated[float, Field(gt=0.0, lt=1.0)]
Momentum = Annotated[float, Field(ge=0.0, lt=1.0)]
Temperature = Annotated[float, Field(ge=1e-6, le=1e3)]


def _location(value: Any) -> Path | str:
    """Convert paths and keep URLs as text, because a path would lose one of their slashes."""
    from data_pipeline.shards.remote import SCHEMES, is_remote

    if not isinstance(value, str | Path) or not str(value):
        raise ValueError(f"given {value!r}, allowed: a path or URL")
    if is_remote(value):
        return str(value)
    if "://" in str(value):
        raise ValueError(f"given {str(value)!r}, allowed: a path or {', '.join(SCHEMES)} URL")
    return Path(value)


Location = Annotated[Path | str, PlainValidator(_location)]
"""Path of this machine, or a URL."""


def _order(given: str) -> str:
    """Raise ValueError for an order that the data pipeline does not have."""
    if given not in ("global", "sequential") and not _WINDOW.fullmatch(given):
        raise ValueError(
            f"given {given!r}, allowed: global, sequential, window(W) with W >= 1 shards"
        )
    return given


_WINDOW = re.compile(r"window\(0*[1-9]\d{0,8}\)")
Order = Annotated[str, AfterValidator(_order)]
"""Name of an order of the data."""


class Section(BaseModel):
    """Base of every section: frozen; unknown keys, infinities and NaN are errors."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False
    )
