"""SIGTERM, SIGINT and SIGUSR1 become one decision that all ranks take at the same step.

A signal reaches ranks at different moments; saving at once on each would write checkpoints of
different steps. So a handler only notes the signal, and before each step ends the ranks agree. A
second signal of the same kind ends the process the ordinary way. Before there is anything to save,
a signal ends the rank at once (`ended_by_signals`).
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
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

    previous = {number: signal.signal(number, _end) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in previous.items():
            if signal.getsignal(number) is _end:
                signal.signal(number, handler)


def _end(number: int, frame: FrameType | None) -> None:
    raise StoppedEarly(signal.Signals(number).name)


def _ordinary(number: int) -> Any:
    """Handler of a process that minds no signals."""
    return signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL


class Preemption:
    """Notes signals from construction on; `requested` is collective.

    Ranks that wait longer than `timeout` for another raise the error of the backend.
    """

    def __init__(self, timeout: timedelta) -> None:
        import torch.distributed as dist

        self._noted = 0
        self._previous: dict[int, Any] = {}
        for number in SIGNALS:
            self._previous[number] = signal.signal(number, self._note)
        # Its own CPU group: agreeing must not wait in the queue of a GPU's collectives.
        several = dist.get_world_size() > 1
        self._group = dist.new_group(backend="gloo", timeout=timeout) if several else None

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._noted = number
        signal.signal(number, _ordinary(number))

    def requested(self) -> str | None:
        """Name of a signal that any rank received, the same answer on every rank, else None."""
        number = self._noted
        if self._group is not None:
            import torch
            import torch.distributed as dist

            agreed = torch.tensor([number])
            dist.all_reduce(agreed, op=dist.ReduceOp.MAX, group=self._group)
            number = int(agreed)
        return signal.Signals(number).name if number else None

    def wait_for_all(self) -> None:
        """Return when every rank has come here: launchers kill the others when one has left."""
        if self._group is not None:
            import torch.distributed as dist

            dist.barrier(group=self._group)

    def close(self) -> None:
        """Give the signals back; what comes now ends the process the ordinary way."""
        for number, handler in self._previous.items():
            signal.signal(number, _ordinary(number) if handler is _end else handler)
