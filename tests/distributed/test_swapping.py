"""Optimizer state that DeepSpeed swaps to disk: the same curve, checkpoints like any other.

DeepSpeed swaps only what is 1 MiB or larger, so the model here is wider than elsewhere; its norms
stay in memory, and its matrices are several sub-groups of uneven sizes. The first run on a machine
builds DeepSpeed's extension: minutes on a quiet machine, and no limit of a single run covers it on
a busy one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from harness import run_ranks
from layouts import Cut, Task, Trainer, as_dict
from test_reshard import END, SAVED, contents, same

from parallel.async_io import build_folders, load_async_io, missing_for_swapping

MISSING = missing_for_swapping()
TASK = Task(
    {"name": "masked"},
    {"num_layers": 3, "hidden_size": 256, "ffn_hidden_size": 520, "tie_embeddings": False},
)
PLAIN, SWAPPED = Cut(dp=2, zero=3), Cut(dp=2, zero=3, offload="nvme")
SWAP_ELEMENTS = 270_000

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(MISSING is not None, reason=f"swapping needs {MISSING}"),
    pytest.mark.timeout(3600),
    pytest.mark.usefixtures("extension"),
]


@pytest.fixture(scope="module")
def extension() -> None:
    """DeepSpeed's extension, built by one rank before any test counts its time."""
    run_ranks(1, build, timeout=3000)


def build() -> None:
    load_async_io()


def trainer(cut: dict[str, Any], disk: Path) -> Trainer:
    """One rank; where it swaps, two sub-groups or more do and one does not."""
    made = Trainer(Cut(**cut), TASK, offload_path=disk, swap_elements=SWAP_ELEMENTS)
    if cut["offload"] == "nvme":
        host: Any = made.engine.deepspeed.optimizer
        swapped = [host._swappable_optimizer_subgroup(i) for i in range(len(host.fp16_groups))]
        assert sum(swapped) >= 2 and not all(swapped)
        assert list(disk.glob("*/zero_stage_3/optimizer/rank*/*.swp"))
    return made


def save(cut: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Train, save in the middle, train on."""
    from parallel.checkpoint import save_checkpoint

    made = trainer(cut, folder / "disk")
    first = made.train(0, SAVED)
    save_checkpoint(made.engine, folder / "saved", SAVED, {})
    held = contents(made)
    curve = first + made.train(SAVED, END)
    return {"held": held, "curve": curve, "end": contents(made)}


def resume(cut: dict[str, Any], folder: Path, used: bool = False) -> dict[str, Any]:
    """Restore, into a fresh engine or one that has trained, and train on."""
    from parallel.checkpoint import load_latest

    made = trainer(cut, folder / "disk")
    if used:
        made.train(0, 2)
    assert load_latest(made.engine, folder / "saved") is not None
    held = contents(made)
    curve = made.train(SAVED, END)
    return {"held": held, "curve": curve, "end": contents(made)}


def close(ours: list[tuple[float, float]], theirs: list[tuple[float, float]]) -> bool:
    return torch.allclose(torch.tensor(ours), torch.tensor(theirs), rtol=1e-6, atol=0)


def test_swapping_changes_neither_curve_nor_checkpoints(tmp_path: Path) -> None:
    plain = run_ranks(2, save, as_dict(PLAIN), tmp_path / "plain", timeout=300)[0]
    swapped = run_ranks(2, save, as_dict(SWAPPED), tmp_path / "swapped", timeout=300)[0]
    assert close(swapped["curve"], plain["curve"])
    assert same(
        run_ranks(2, resume, as_dict(PLAIN), tmp_path / "swapped", timeout=300)[0]["held"],
        swapped["held"],
    )
    crossed = run_ranks(2, resume, as_dict(SWAPPED), tmp_path / "plain", timeout=300)[0]
    assert same(crossed["held"], plain["held"])
    assert close(crossed["curve"], plain["curve"][SAVED:])
    for used in (False, True):
        again = run_ranks(2, resume, as_dict(SWAPPED), tmp_path / "swapped", used, timeout=300)[0]
        assert same(again["held"], swapped["held"])
        assert again["curve"] == swapped["curve"][SAVED:]
        assert same(again["end"], swapped["end"])


def die(cut: dict[str, Any], folder: Path) -> None:
    """Train past the checkpoint of `folder` and be killed with state on disk."""
    import os
    import signal

    made = trainer(cut, folder / "disk")
    made.train(0, 2)
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_run_goes_on_and_leaves_nothing(tmp_path: Path) -> None:
    saved = run_ranks(2, save, as_dict(SWAPPED), tmp_path, timeout=300)[0]
    run_ranks(2, die, as_dict(SWAPPED), tmp_path, timeout=300, may_die=True)
    left = set((tmp_path / "disk").glob("epochal-swap-*"))
    assert left
    for folder in build_folders():
        (folder / "lock").touch()  # as when it had been killed while it was building
    again = run_ranks(2, resume, as_dict(SWAPPED), tmp_path, timeout=300)[0]
    assert again["curve"] == saved["curve"][SAVED:]
    assert same(again["end"], saved["end"])
    assert not left & set((tmp_path / "disk").glob("epochal-swap-*"))
