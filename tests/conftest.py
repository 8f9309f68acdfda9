"""A small pool of real text, prepared once for the whole test session."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a prepared pool: the built-in corpus with a vocabulary of 512 pieces."""
    from data_pipeline.prepare.prepare import prepare
    from data_pipeline.prepare.settings import PrepareSettings, TokenizerSettings

    out = tmp_path_factory.mktemp("pool")
    prepare(
        PrepareSettings(
            out=out,
            tokenizer=TokenizerSettings(model_type="bpe", vocab_size=512, train_bytes=200_000),
            validation_fraction=0.02,
        )
    )
    return out
