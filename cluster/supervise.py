"""Watching ranks: a signal to this process becomes one to them, and none is left behind.

The first signal asks the ranks to save and stop, a second one kills them. Ranks stand outside the
terminal's process group, so Ctrl-C reaches only this process.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import FrameType
from typing import Protocol

from cluster.outcome import Ended

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_POLL_SECONDS = 0.05


class Ranks(Protocol):
    """Ranks that were started, here or on other machines."""

    def poll(self) -> Ended | None:
        """The end of all ranks, None while one still runs."""

    def stop(self) -> None:
        """Ask every rank to save and stop (SIGTERM)."""

    def kill(self) -> None:
        """Kill every process that is left; harmless when there is none."""


def supervise(start: Callable[[], Ranks]) -> Ended:
    """Start ranks and watch them to their end."""
    received: list[int] = []
    with noting_signals(received):
        ranks = start()
        try:
            ended = _wait(ranks, received)
        finally:
            ranks.kill()
    if not received:
        return ended
    if len(received) > 1:
        return replace(ended, killed=True)
    return replace(ended, stopped_by=signal.Signals(received[0]).name)


def say(text: str) -> None:
    """Tell the person who watches."""
    print(text, file=sys.stderr, flush=True)


@contextmanager
def noting_signals(received: list[int]) -> Iterator[None]:
    """Context in which signals are appended to `received` instead of ending this process."""

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)

    previous = {number: signal.signal(number, note) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _wait(ranks: Ranks, received: list[int]) -> Ended:
    forwarded = 0
    while (ended := ranks.poll()) is None:
        if len(received) > forwarded:
            forwarded = len(received)
            name = signal.Signals(received[-1]).name
            if forwarded == 1:
                say(f"{name}: the ranks save and stop; once more kills them")
                ranks.stop()
            else:
                say(f"{name} again: killing the ranks; the last checkpoint is intact")
                ranks.kill()
        time.sleep(_POLL_SECONDS)
    return ended
