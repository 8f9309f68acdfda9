"""The installed command and how tests call it; a run that they share.

`epochal` (conftest.py) starts the command as a user does, which takes a second, and several for
every rank. What a test asks of the program rather than of its installation runs in a process that
the harness forks with everything imported: `program` (the command line), `rank` (what a rank does).
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

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
    "tracking.mlflow=false",  # its import takes as long as torch's
    "run.device=cpu",
]
ONE_EPOCH = ["objective=masked", "data.epochs=1", "train.log_interval=1", "parallel.zero_stage=0"]
"""Overrides of the run `finished`: 25 steps."""


def small_run(pool: Path) -> list[str]:
    """Overrides of a small run on this pool."""
    return [
        *SMALL,
        f"data.train={pool / 'train' / 'manifest.json'}",
        f"data.validation={pool / 'validation' / 'manifest.json'}",
        f"data.tokenizer={pool / 'tokenizer.model'}",
    ]


def environment() -> dict[str, str]:
    """This environment with plain output and one thread a rank."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1", "COLUMNS": "200"}


@dataclass(frozen=True)
class Answer:
    """How a call ended and what it printed, named as by `subprocess`."""

    returncode: int
    stdout: str
    stderr: str


def command(words: list[str]) -> Answer:
    """`epochal WORDS` in this process."""
    from pretrain.cli.main import main

    sys.argv = ["epochal", *words]
    return _call(main)


def train(words: list[str]) -> Answer:
    """What a rank does that is started with these words."""
    from pretrain.train import main

    return _call(lambda: sys.exit(main(words)))


def _call(main: Callable[[], None]) -> Answer:
    os.environ.update(NO_COLOR="1", COLUMNS="200")
    out, error = io.StringIO(), io.StringIO()
    code = 0
    with redirect_stdout(out), redirect_stderr(error):
        try:
            main()
        except SystemExit as ended:
            code = int(ended.code or 0)
    return Answer(code, out.getvalue(), error.getvalue())
