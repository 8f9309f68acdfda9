"""The data state of a run: one position and the fingerprint that gives it its meaning.

A person can read it. It holds no state of a generator and no file of a worker: epochs, batch size,
stop step, schedule and number of ranks are not part of it, so lengthening a run or branching off a
decay is legal.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from data_pipeline.errors import CursorError
from data_pipeline.stream.stream import Stream


@dataclass(frozen=True)
class Cursor:
    """Number of sequences that the optimizer consumed, and fingerprint of their stream."""

    position: int
    """Global sample position of the next sequence."""
    order_version: int
    order: str
    seed: int
    manifest: str
    """Identity of the pool (of the mixture description when several are mixed)."""
    tokenizer: str
    budget: int
    """Unique tokens."""
    seq_length: int
    documents: str

    @staticmethod
    def at(stream: Stream, position: int) -> Cursor:
        """Make the cursor of `stream` after `position` sequences were consumed."""
        return Cursor(position=position, **stream.fingerprint())

    def to_dict(self) -> dict[str, int | str]:
        """Fields as plain values for JSON."""
        return asdict(self)

    @staticmethod
    def from_dict(value: Any) -> Cursor:
        """Read the form of `to_dict`; CursorError names missing, unknown and malformed fields."""
        if not isinstance(value, dict):
            raise CursorError(f"not a data cursor: {type(value).__name__} instead of an object")
        known = {field.name: str if field.type == "str" else int for field in fields(Cursor)}
        if set(value) != known.keys():
            raise CursorError(
                f"not a data cursor: missing {sorted(known.keys() - set(value))}, "
                f"unknown {sorted(set(value) - known.keys())}"
            )
        wrong = [name for name, kind in known.items() if type(value[name]) is not kind]
        if wrong or value["position"] < 0:
            raise CursorError(f"not a data cursor: {(wrong or ['position'])[0]} is malformed")
        return Cursor(**value)

    def check(self, stream: Stream) -> None:
        """Raise CursorError with both values of every field that differs from `stream`'s."""
        found = stream.fingerprint()
        saved = {key: value for key, value in asdict(self).items() if key != "position"}
        different = [key for key in saved if saved[key] != found[key]]
        if different:
            rows = "\n  ".join(f"{key}: saved {saved[key]}, now {found[key]}" for key in different)
            raise CursorError(
                f"position {self.position:,} belongs to another data stream:\n  {rows}\n"
                "restore these settings or start a new run (epochs, batch size, stop step and "
                "number of ranks may change)"
            )
