"""The command of a user: installed and run, or its program alone in a forked process."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "distributed"))  # the harness
sys.path.insert(0, str(Path(__file__).parent))

import documents
import installed
from harness import run_ranks
from installed import EPOCHAL, ONE_EPOCH, Answer, environment, small_run

Call = Callable[..., Answer]


@pytest.fixture(scope="session")
def epochal() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run `epochal ARGUMENTS` to its end and return what it printed."""

    def run(*arguments: str | Path, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        command = [str(EPOCHAL), *map(str, arguments)]
        return subprocess.run(
            command, capture_output=True, text=True, timeout=timeout, check=False, env=environment()
        )

    return run


@pytest.fixture(scope="session")
def program() -> Call:
    """The same in a forked process, for what starts no ranks."""
    return lambda *words: run_ranks(1, installed.command, [*map(str, words)], launcher=False)[0]


@pytest.fixture(scope="session")
def rank() -> Call:
    """One rank of `epochal train ARGUMENTS`, forked."""
    return lambda *words: run_ranks(1, installed.train, [*map(str, words)], launcher=False)[0]


@pytest.fixture
def overrides(pool: Path, tmp_path: Path) -> list[str]:
    """Overrides of a small run on the shared pool, in a folder of its own."""
    return [*small_run(pool), f"run.root={tmp_path}", "run.name=r"]


@pytest.fixture(scope="session")
def finished(rank: Call, pool: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a finished run of `ONE_EPOCH` on one rank; what it holds is not to be changed."""
    run = tmp_path_factory.mktemp("finished")
    result = rank(*small_run(pool), *ONE_EPOCH, f"run.dir={run}")
    assert result.returncode == 0, result.stdout + result.stderr
    return run


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say how many commands of the documents no test can run, and why."""
    terminalreporter.write_line(documents.summary())
