"""How long jobs report: a small protocol, so that the command line may draw bars or print lines."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Receives the stages of a job; every call is cheap and may be ignored."""

    def start(self, stage: str, total: int | None, unit: str) -> None:
        """A stage of `total` units begins (None: unknown)."""
        ...

    def advance(self, amount: int, **rates: float) -> None:
        """`amount` further units are done; `rates` are counters worth showing, e.g. tokens."""
        ...

    def note(self, text: str) -> None:
        """One line worth keeping."""
        ...


class Silent:
    """Reports nothing."""

    def start(self, stage: str, total: int | None, unit: str) -> None:
        """Ignore."""

    def advance(self, amount: int, **rates: float) -> None:
        """Ignore."""

    def note(self, text: str) -> None:
        """Ignore."""
