"""The folder of benchmarks as a place to import from, as when one of them is started."""

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    """Import benchmarks and the modules beside them by their names."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")


@pytest.fixture(scope="session")
def root():
    """The checkout."""
    return ROOT
