"""The installed command, the environment that tests start it in, and a run that they share."""

from __future__ import annotations

import os
import sys
from pathlib import Path

EPOCHAL = Path(sys.executable).with_name("epochal")
ONE_EPOCH = ["objective=masked", "data.epochs=1", "train.log_interval=1", "parallel.zero_stage=0"]
"""Overrides of the run `finished`: 25 steps."""


def environment() -> dict[str, str]:
    """This environment with plain output and one thread a rank."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1", "COLUMNS": "200"}
