"""A small pool of real text, prepared once for all workers; they stop together."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Generator
from pathlib import Path

import pytest


def shared_folder(factory: pytest.TempPathFactory) -> Path:
    """Folder of temporary files that all workers of a session have in common."""
    base = factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Let -x stop every worker: each has half of the tests, and would run them to the end."""
    report = yield
    if "PYTEST_XDIST_WORKER" in os.environ and item.config.option.maxfail:
        failures = shared_folder(item.config._tmp_path_factory) / "failures"
        if report.failed:
            with failures.open("a") as file:
                file.write(f"{item.nodeid}\n")
        if failures.exists():
            count = len(failures.read_text().splitlines())
            if count >= item.config.option.maxfail:
                item.session.shouldstop = f"stopping after {count} failures"
    return report


@pytest.fixture(scope="session")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a prepared pool: the built-in corpus with a vocabulary of 512 pieces."""
    from data_pipeline.prepare.prepare import prepare
    from data_pipeline.prepare.settings import PrepareSettings, TokenizerSettings

    shared = shared_folder(tmp_path_factory)
    settings = PrepareSettings(
        out=shared / "pool",
        tokenizer=TokenizerSettings(model_type="bpe", vocab_size=512, train_bytes=200_000),
        validation_fraction=0.02,
        workers=1,
    )
    with (shared / "pool.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        prepare(settings)  # of several workers of pytest, the second finds it made
    return settings.out
