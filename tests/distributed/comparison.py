"""How runs and tensors are compared: bit for bit, or within what rounding makes of a curve."""

from __future__ import annotations

from pathlib import Path

import pytest
import runs
import torch
from torch import Tensor


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether the same names have the same tensors, bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def assert_same_run(run: Path, reference: Path, step: int = runs.STEPS) -> None:
    """Every measurement, and the checkpoint of `step` with its state, bit for bit."""
    assert runs.log(run) == runs.log(reference)
    assert_same_checkpoint(run, reference, step)


def assert_same_checkpoint(run: Path, reference: Path, step: int = runs.STEPS) -> None:
    """All tensors and the state of the checkpoint of `step`, bit for bit."""
    ours, theirs = runs.checkpoint(run, step), runs.checkpoint(reference, step)
    assert ours.pop("state") == theirs.pop("state")
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name


def assert_same_curve(run: Path, reference: Path) -> None:
    """Losses, norms and bounds within 1e-5, weights within 1e-3 of the distance they moved."""
    ours, theirs = runs.log(run), runs.log(reference)
    assert sorted(ours) == sorted(theirs) == list(range(1, runs.STEPS + 1))
    assert any("validation/nats_per_token" in record for record in ours.values())
    for step, record in theirs.items():
        assert set(ours[step]) == set(record)
        for name, value in record.items():
            assert ours[step][name] == pytest.approx(value, rel=1e-5), (step, name)
    end, want = runs.checkpoint(run, runs.STEPS), runs.checkpoint(reference, runs.STEPS)
    start = runs.checkpoint(reference, 4)
    for name in ("lowest_loss", "reference_loss"):  # of evaluations, equal to rounding
        loss = want["state"]["train"].pop(name)
        assert end["state"]["train"].pop(name) == pytest.approx(loss, rel=1e-5)
    assert end["state"] == want["state"]
    for name, tensor in want.items():
        if name == "state" or name.startswith("exp_avg"):
            continue
        moved = (tensor - start[name]).norm()
        assert (end[name] - tensor).norm() <= 1e-3 * moved, name
