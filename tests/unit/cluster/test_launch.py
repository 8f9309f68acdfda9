"""The plan of a launch on one machine."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import cluster
from cluster.errors import ClusterError, LaunchError
from cluster.launch import Job, plan_launch
from cluster.local import LocalRanks


def job(ranks: int, **more: object) -> Job:
    """A job of a module `m`."""
    return Job("m", ["--config", "a b"], Path("run"), ranks, {"OMP_NUM_THREADS": "3"}, **more)  # type: ignore[arg-type]


def test_the_printed_command_of_one_rank_can_be_pasted() -> None:
    words = shlex.split(str(plan_launch(job(1), {})))
    words = [word for word in words if not word.startswith("PYTHONPATH=")]
    variables = ["OMP_NUM_THREADS=3", "PYTHONSAFEPATH=1"]
    assert words == [*variables, sys.executable, "-u", "-m", "m", "--config", "a b"]


def test_the_working_folder_is_no_place_for_modules(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder there that shadows ours is not imported; packages in PYTHONPATH are."""
    for package, text in {
        "here/cluster": "raise SystemExit('shadowed')",
        "path/mine": "print('mine', flush=True)",
    }.items():
        (tmp_path / package).mkdir(parents=True)
        (tmp_path / package / "__init__.py").write_text(text)
    (tmp_path / "path/mine/__main__.py").write_text("import cluster.errors; print('imported')")
    root = str(Path(cluster.__file__).parents[1])
    monkeypatch.setattr(sys, "path", [root, *sys.path])  # as after `python -m` in a checkout
    plan = plan_launch(Job("mine", [], tmp_path, 1), {"PYTHONPATH": str(tmp_path / "path")})
    done = subprocess.run(
        plan.command,
        env={**os.environ, **plan.environment},
        cwd=tmp_path / "here",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split() == ["mine", "imported"], done.stderr


def test_the_number_of_ranks_is_printed() -> None:
    assert str(plan_launch(job(4), {})).startswith("4 ranks: OMP_NUM_THREADS=3 ")


def test_every_rank_needs_a_visible_gpu() -> None:
    plan_launch(job(2, on_gpus=True), {})
    plan_launch(job(2, on_gpus=True), {"CUDA_VISIBLE_DEVICES": "3,5,7"})
    plan_launch(job(2, on_gpus=True), {"CUDA_VISIBLE_DEVICES": "GPU-abc,GPU-def"})
    plan_launch(job(2), {"CUDA_VISIBLE_DEVICES": ""})
    for shown, count in (("3", 1), ("", 0)):
        with pytest.raises(ClusterError, match=f"shows {count} GPUs, but 2 ranks need one each"):
            plan_launch(job(2, on_gpus=True), {"CUDA_VISIBLE_DEVICES": shown})


def test_a_command_that_does_not_exist() -> None:
    with pytest.raises(LaunchError, match="cannot start /nowhere/python: No such file"):
        LocalRanks(["/nowhere/python"], 2, {})
