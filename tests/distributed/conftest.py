"""Modules beside the tests, importable by name; runs that several tests compare theirs with."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import runs
from harness import run_ranks


@pytest.fixture(scope="session")
def undisturbed(pool: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`undisturbed(*overrides)`: folder of that run on one rank at stage 0, made once a session."""
    made: dict[tuple[str, ...], Path] = {}

    def folder(*more: str) -> Path:
        if more not in made:
            run = tmp_path_factory.mktemp("undisturbed")
            plain = (*more, "parallel.zero_stage=0")
            assert run_ranks(1, runs.train, pool, run, *plain, launcher=False) == [0]
            made[more] = run
        return made[more]

    return folder
