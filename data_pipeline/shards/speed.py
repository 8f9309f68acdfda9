"""Minimum speed of a transfer: a server that sends a byte now and then must not hold a run."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress


class SpeedWatch:
    """Thread that stops a transfer which brings too few bytes in a window of time.

    A timeout of the socket does not do this: each byte begins it anew.
    """

    def __init__(self, bytes_per_second: float, window: float) -> None:
        """Watch from `__enter__` on; every `window` seconds must bring enough bytes."""
        self.received = 0
        """Bytes so far; the transfer adds to it."""
        self.slow = False
        """True once the transfer was stopped."""
        self.stops: list[Callable[[], object]] = []
        """Functions that end the transfer from another thread."""
        self._needed, self._window = bytes_per_second * window, window
        self._done = threading.Event()

    def __enter__(self) -> SpeedWatch:
        threading.Thread(target=self._watch, name="download-speed", daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()

    def _watch(self) -> None:
        before = 0
        while not self._done.wait(self._window):
            if self.received - before < self._needed:
                self.slow = True
                for stop in self.stops:
                    with suppress(OSError, ValueError):
                        stop()
                return
            before = self.received
