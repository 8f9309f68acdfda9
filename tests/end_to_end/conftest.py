"""The installed command, run as a user runs it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

EPOCHAL = Path(sys.executable).with_name("epochal")
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


def environment() -> dict[str, str]:
    """This environment with plain output and one thread a rank."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1", "COLUMNS": "200"}


@pytest.fixture
def overrides(pool: Path, tmp_path: Path) -> list[str]:
    """Overrides of a small run on the shared pool, in a folder of its own."""
    return [
        *SMALL,
        f"data.train={pool / 'train' / 'manifest.json'}",
        f"data.validation={pool / 'validation' / 'manifest.json'}",
        f"data.tokenizer={pool / 'tokenizer.model'}",
        f"run.root={tmp_path}",
        "run.name=r",
    ]
