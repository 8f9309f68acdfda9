"""A cache of compiled kernels that a killed compilation has damaged."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from installed import EPOCHAL, environment


@pytest.mark.slow
def test_an_empty_object_in_the_cache_costs_one_start_and_not_the_run(
    overrides: list[str], tmp_path: Path
):
    """The ranks are started once more with a fresh folder, which then takes the place."""
    home = tmp_path / "home"
    env = environment() | {"HOME": str(home)}
    env.pop("TORCHINDUCTOR_CACHE_DIR", None)  # torch sets it in a process that compiles
    compiled = ["train.compile=true", "train.stop_step=2", "data.epochs=1"]

    def train(name: str) -> str:
        command = [EPOCHAL, "train", *overrides, *compiled, f"run.dir={tmp_path / name}"]
        done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def objects() -> list[Path]:
        (cache,) = (home / ".cache/epochal/inductor").iterdir()
        return list(cache.rglob("*.so"))

    assert "fresh cache" not in train("first")
    assert objects()
    for file in objects():
        os.truncate(file, 0)
    assert "once more with a fresh cache" in train("second")
    assert all(file.stat().st_size for file in objects())
    assert "fresh cache" not in train("third")
