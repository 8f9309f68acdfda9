"""The installed command, run as a user runs it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # `installed`, for the tests beside this file

from installed import EPOCHAL, ONE_EPOCH, environment

SMALL = [
    "model.num_layers=1",
    "model.hidden_size=32",
    "model.num_attention_heads=4",
    "data.seq_length=32",
    "data.unique_tokens=6400",
    "train.global_batch_size=8",
    "train.log_interval=5",
    "evaluation.sequences=16",
    "run.device=cpu",
]


@pytest.fixture(scope="session")
def epochal() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run `epochal ARGUMENTS` to its end and return what it printed."""

    def run(*arguments: str | Path, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        command = [str(EPOCHAL), *map(str, arguments)]
        return subprocess.run(
            command, capture_output=True, text=True, timeout=timeout, check=False, env=environment()
        )

    return run


@pytest.fixture
def overrides(pool: Path, tmp_path: Path) -> list[str]:
    """Overrides of a small run on the shared pool, in a folder of its own."""
    return [*small_run(pool), f"run.root={tmp_path}", "run.name=r"]


def small_run(pool: Path) -> list[str]:
    """Overrides of a small run on this pool."""
    return [
        *SMALL,
        f"data.train={pool / 'train' / 'manifest.json'}",
        f"data.validation={pool / 'validation' / 'manifest.json'}",
        f"data.tokenizer={pool / 'tokenizer.model'}",
    ]


@pytest.fixture(scope="session")
def finished(epochal, pool: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a finished run of `ONE_EPOCH` on one rank; what it holds is not to be changed."""
    run = tmp_path_factory.mktemp("finished")
    result = epochal("train", *small_run(pool), *ONE_EPOCH, f"run.dir={run}")
    assert result.returncode == 0, result.stdout + result.stderr
    return run
