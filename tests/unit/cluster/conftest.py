"""Makes the stage importable by name from the tests beside it, and cleans up after it."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from stage import RANK, Stage, is_running


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    """A stage, whose processes are killed afterwards."""
    (tmp_path / "stand_in.py").write_text(RANK)
    made = Stage(tmp_path)
    yield made
    for process in made.started:
        process.kill()
    for file in [*tmp_path.glob("*/ready-*"), *tmp_path.glob("*/child-*")]:
        if is_running(pid := int(file.read_text() or 0)):
            os.kill(pid, signal.SIGKILL)
    for process in made.started:  # only now has its output an end
        process.communicate()
