"""The harness itself: results by rank, failures and hangs reported, nothing left running."""

from __future__ import annotations

import os
import signal
import time

import psutil
import pytest
from harness import Died, RankError, run_ranks


def add_ranks() -> tuple[int, float]:
    import torch
    import torch.distributed as dist

    from parallel.runtime import init_distributed

    runtime = init_distributed(timeout_minutes=1)
    total = torch.tensor(float(runtime.rank + 1))
    dist.all_reduce(total)
    return runtime.rank, float(total)


def fail_on_one_and_hang_on_the_other() -> None:
    if os.environ["RANK"] == "1":
        print("about to fail")
        raise ValueError("seven is not eight")
    time.sleep(600)


def record_pid_and_hang(path: str) -> None:
    with open(path, "a") as file:
        file.write(f"{os.getpid()}\n")
    time.sleep(600)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_every_rank_returns_its_own_value() -> None:
    assert run_ranks(2, add_ranks) == [(0, 3.0), (1, 3.0)]


def test_a_failing_rank_fails_the_call_although_the_other_one_hangs() -> None:
    with pytest.raises(RankError, match="seven is not eight") as caught:
        run_ranks(2, fail_on_one_and_hang_on_the_other)
    assert "about to fail" in str(caught.value)


def test_a_hang_ends_at_the_time_limit_and_leaves_no_process(tmp_path) -> None:
    with pytest.raises(RankError, match="Died"):
        # Long enough for both to have begun on a busy machine.
        run_ranks(2, record_pid_and_hang, str(tmp_path / "pids"), timeout=5.0)
    pids = [int(line) for line in (tmp_path / "pids").read_text().split()]
    assert len(pids) == 2
    assert not any(psutil.pid_exists(pid) for pid in pids)


def test_a_killed_rank_is_reported_with_its_signal() -> None:
    assert run_ranks(1, die, may_die=True) == [Died(-signal.SIGKILL)]
