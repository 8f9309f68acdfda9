"""A signal before training begins, when there is nothing to save, ends the rank at once."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StoppedEarly(BaseException):
    """A signal came before training began; not an error, so no `except Exception` takes it."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Context in which a signal raises StoppedEarly, until `Preemption` takes it over."""
    previous = {number: signal.signal(number, end_early) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in previous.items():
            if signal.getsignal(number) is end_early:
                signal.signal(number, handler)


def end_early(number: int, frame: FrameType | None) -> None:
    """Handler of `ended_by_signals`."""
    raise StoppedEarly(signal.Signals(number).name)


def ordinary(number: int) -> Any:
    """Handler of a process that minds no signals."""
    return signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
