"""Ranks that do not answer: the time that all groups wait, and the names of those waited for.

A rank that was stopped, or whose machine has lost its network, leaves the others in a collective.
Their backends give up after the time set here, each with a message about sockets. So the ranks that
gave up count themselves at the rendezvous; those that are missing there did not answer.
"""

from __future__ import annotations

import threading
import time
from datetime import timedelta

import torch.distributed as dist

_KEY = "epochal/gave_up"
_GATHERING_SECONDS = 10.0
"""Time in which the other ranks give up too."""


def limit_waiting(timeout: timedelta) -> None:
    """Let the collectives of every group of this process end after `timeout`.

    megatron-core counts whole minutes, and DeepSpeed's groups take torch's default of 30.
    """
    from torch.distributed import distributed_c10d as c10d

    for group in list(c10d._world.pg_map):
        c10d._set_pg_timeout(timeout, group)


def gave_up(error: BaseException) -> bool:
    """True for the error of a collective that waited too long; before there are groups, False."""
    text = str(error).lower()
    waited = isinstance(error, RuntimeError) and ("timed out" in text or "timeout" in text)
    return waited and dist.is_initialized()


def silent_ranks(wait_seconds: float = _GATHERING_SECONDS) -> list[int]:
    """Ranks that did not give up within `wait_seconds` from now; rank 0 where it cannot be asked.

    Every rank that gave up calls it.
    """
    found = [0]  # the rendezvous is a thread of rank 0
    asking = threading.Thread(target=_ask, args=(wait_seconds, found), daemon=True)
    asking.start()
    asking.join(wait_seconds + 5.0)
    return found


def _ask(wait_seconds: float, found: list[int]) -> None:
    from torch.distributed import distributed_c10d as c10d

    store = c10d._get_default_store()
    store.set(f"{_KEY}/{dist.get_rank()}", "1")
    time.sleep(wait_seconds)
    found[:] = [r for r in range(dist.get_world_size()) if not store.check([f"{_KEY}/{r}"])]
