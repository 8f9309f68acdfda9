"""A study of small runs on the shared pool."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pretrain.study.runner.settings import Study, make_study

SMALL = [
    "model.num_layers=2",
    "model.hidden_size=16",
    "model.num_attention_heads=2",
    "data.seq_length=32",
    "train.global_batch_size=8",
    "evaluation.sequences=16",
    "tracking.mlflow=false",
    "run.device=cpu",
]


@pytest.fixture
def small(pool: Path) -> Callable[..., Study]:
    """Make a study on the pool; `base` comes after the settings of a small run."""
    files = [
        f"data.train={pool / 'train' / 'manifest.json'}",
        f"data.validation={pool / 'validation' / 'manifest.json'}",
        f"data.tokenizer={pool / 'tokenizer.model'}",
    ]

    def make(base: tuple[str, ...] = (), **values: Any) -> Study:
        plain = {"name": "s", "learning_rate": "one for all", "base": [*SMALL, *files, *base]}
        return make_study({**plain, **values}, "s.yaml")

    return make
