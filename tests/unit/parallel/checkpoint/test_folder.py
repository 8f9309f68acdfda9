"""Which checkpoints stay when another becomes complete."""

from __future__ import annotations

from pathlib import Path

import pytest

from parallel.checkpoint.folder import KEEP, Target, commit, make_empty
from parallel.checkpoint.manifest import FORMAT, Manifest


def save(folder: Path, step: int, *, keep: int = 0, forever: bool = False) -> None:
    """A complete checkpoint without tensors."""
    target = Target(folder, step, keep, forever)
    make_empty(target)
    commit(Manifest(FORMAT, step, step, {}, 0, "float32", {}, {}, {}, {}), target)


def steps(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in folder.iterdir())


def test_marked_checkpoints_stay_and_are_not_counted(tmp_path: Path) -> None:
    for step in range(1, 10):
        save(tmp_path, step, keep=2, forever=step in (2, 5))
    assert steps(tmp_path) == [2, 5, 8, 9]
    save(tmp_path, 10, keep=1)
    assert steps(tmp_path) == [2, 5, 10]


@pytest.mark.parametrize("by_hand", [True, False])
def test_a_mark_survives_another_save_of_its_step(tmp_path: Path, by_hand: bool) -> None:
    save(tmp_path, 1, forever=not by_hand)
    if by_hand:
        (tmp_path / "step-00000001" / KEEP).touch()
    for step in (1, 2, 3):
        save(tmp_path, step, keep=1)
    assert steps(tmp_path) == [1, 3]
