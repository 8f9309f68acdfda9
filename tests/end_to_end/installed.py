"""The installed command and the environment that tests start it in."""

from __future__ import annotations

import os
import sys
from pathlib import Path

EPOCHAL = Path(sys.executable).with_name("epochal")


def environment() -> dict[str, str]:
    """This environment with plain output and one thread a rank."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1", "COLUMNS": "200"}
