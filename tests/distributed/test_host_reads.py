"""How often the host waits for the device in a step: once, at its end; DeepSpeed's ZeRO oftener.

The counts are those of `docs/performance.md`. The host prefetches the batches of the next step
before the first of them.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness import run_ranks
from host_reads import HostReads
from layouts import TASKS, WHOLE_TASKS, Layout, Trainer, as_dict, shallow

PREFETCHED = "prefetched"
OURS = "aten._local_scalar_dense in parallel/engine/single_stage.py:_step"


def step(layout: dict[str, Any], task: str) -> list[str]:
    """Reads of one step on this rank, and when the host was given time for something else."""
    trainer = Trainer(Layout(**layout), shallow({**TASKS, **WHOLE_TASKS}[task]))
    trainer.train(0, 1)
    batches = trainer.batches(1)
    with HostReads() as reads:
        trainer.engine.step(batches, 128, 1e-3, lambda: reads.found.append(PREFETCHED))
    return reads.found


def reads_of(layout: Layout, task: str) -> list[str]:
    """What every rank reads after both micro-batches; they all read alike."""
    every = run_ranks(layout.ranks, step, as_dict(layout), task)
    assert all(found == every[0] for found in every)
    assert every[0][:2] == [PREFETCHED, PREFETCHED], "nothing is read before or between"
    return every[0][2:]


def counted() -> list[str]:
    """What the counter sees of a few lines that read, and of some that do not."""
    x = torch.arange(6.0, requires_grad=True)
    with HostReads() as reads:
        y = (x * 2).sum()
        y.backward()
        x.detach().masked_fill(x > 3, 0.0)[torch.tensor([0, 1])]
        assert not reads.found, reads.found
        float(y)
        x[x > 3]
        (x > 3).nonzero()
        x.detach().tolist()
        torch.arange(3).repeat_interleave(torch.tensor([1, 2, 1]))
        bool(torch.isfinite(y))
    return [read.split(" in ")[0] for read in reads.found]


def test_the_counter_sees_what_waits_for_a_device() -> None:
    (found,) = run_ranks(1, counted)
    assert found == [
        "aten._local_scalar_dense",
        "aten.index",
        "aten.nonzero",
        "tolist",
        "aten.repeat_interleave",
        "aten._local_scalar_dense",
    ]


@pytest.mark.parametrize("task", [*TASKS, *WHOLE_TASKS])
def test_a_step_of_any_objective_waits_once_at_its_end(task: str) -> None:
    assert reads_of(Layout(), task) == [OURS]


@pytest.mark.parametrize(
    ("layout", "task"),
    [
        (Layout(dp=2), "interpolating"),
        (Layout(tp=2, chunk=7), "masked"),
        (Layout(tp=2, sp=True, recompute="full"), "autoregressive"),
        (Layout(tp=2, sp=True), "uniform"),
        (Layout(cp=2), "block"),
        (Layout(tp=2), "gaussian"),
    ],
    ids=str,
)
def test_no_layout_without_zero_waits_oftener(layout: Layout, task: str) -> None:
    assert reads_of(layout, task) == [OURS]


@pytest.mark.parametrize(
    ("layout", "count"),
    [
        (Layout(dp=2, zero=1), 3),
        (Layout(dp=2, zero=2), 3),
        (Layout(dp=2, zero=3), 1),
        (Layout(pp=2, zero=1), 3),
        (Layout(dp=2, zero=1, precision="bfloat16"), 2),
        (Layout(dp=2, zero=2, precision="bfloat16"), 4),
        (Layout(dp=2, zero=3, precision="bfloat16"), 1),
        (Layout(pp=2, zero=1, precision="bfloat16"), 2),
    ],
    ids=str,
)
def test_deepspeeds_reads_are_those_of_its_update(layout: Layout, count: int) -> None:
    """One or two to learn whether the gradient is finite, one more for each group that it clips."""
    found = reads_of(layout, "masked")
    assert len(found) == count, found
    own = [read for read in found if "parallel/" in read or "pretrain/" in read]
    assert not own
