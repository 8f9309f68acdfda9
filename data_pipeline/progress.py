"""Progress of long jobs: a small protocol, for bars on a terminal or lines in a log."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Receiver of a job's stages; every call is cheap and may be ignored."""

    def start(self, stage: str, total: int | None, unit: str) -> None:
        """Begin a stage of `total` units (None: unknown)."""
        ...

    def advance(self, amount: int, **rates: float) -> None:
        """Count `amount` further units; `rates` are counters worth showing, e.g. tokens."""
        ...

    def note(self, text: str) -> None:
        """Keep one line of text."""
        ...


class Silent:
    """Progress that reports nothing."""

    def start(self, stage: str, total: int | None, unit: str) -> None:
        """Ignore."""

    def advance(self, amount: int, **rates: float) -> None:
        """Ignore."""

    def note(self, text: str) -> None:
        """Ignore."""
