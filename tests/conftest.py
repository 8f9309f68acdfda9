"""A small pool of real text, prepared once for the whole test session."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a prepared pool: the built-in corpus with a vocabulary of 512 pieces."""
    from data_pipeline.prepare.prepare import prepare
    from data_pipeline.prepare.settings import PrepareSettings, TokenizerSettings

    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
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
