"""SIGTERM, SIGINT and SIGUSR1 become one decision that all ranks take at the same step.

A signal reaches ranks at different moments; saving at once on each would write checkpoints of
different steps. So a handler only notes the signal, and before each step ends the ranks agree. A
second signal of the same kind ends the process the ordinary way.
"""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from cluster.rank.early import SIGNALS, end_early, ordinary


class Preemption:
    """Notes signals from construction on; `requested` is collective."""

    def __init__(self) -> None:
        self._noted = 0
        self._previous: dict[int, Any] = {}
        for number in SIGNALS:
            self._previous[number] = signal.signal(number, self._note)
        # Its own CPU group: agreeing must not wait in the queue of a GPU's collectives.
        self._group = dist.new_group(backend="gloo") if dist.get_world_size() > 1 else None

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._noted = number
        signal.signal(number, ordinary(number))

    def requested(self) -> str | None:
        """Name of a signal that any rank received, the same answer on every rank, else None."""
        number = self._noted
        if self._group is not None:
            agreed = torch.tensor([number])
            dist.all_reduce(agreed, op=dist.ReduceOp.MAX, group=self._group)
            number = int(agreed)
        return signal.Signals(number).name if number else None

    def wait_for_all(self) -> None:
        """Return when every rank has come here: launchers kill the others when one has left."""
        if self._group is not None:
            dist.barrier(group=self._group)

    def close(self) -> None:
        """Give the signals back; what comes now ends the process the ordinary way."""
        for number, handler in self._previous.items():
            signal.signal(number, ordinary(number) if handler is end_early else handler)
