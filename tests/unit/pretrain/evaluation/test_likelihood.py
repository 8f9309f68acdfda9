"""Likelihood estimates: their units, and that batches and windows of training change nothing."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from data_pipeline.tokenizer import load_tokenizer
from pretrain.config.objectives import objectives
from pretrain.config.run import EvaluationConfig
from pretrain.evaluation.likelihood import evaluate_likelihood, summarize
from pretrain.evaluation.text_bytes import TextBytes
from pretrain.objectives import build_objective


def test_summary_is_a_ratio_of_sums_in_the_stated_units():
    bounds, tokens = np.array([[10.0, 30.0, 20.0]]), np.array([5, 10, 10])
    result = summarize(bounds, tokens, 75, is_bound=False)
    assert result.nats_per_token == pytest.approx(60 / 25)
    assert result.bits_per_byte == pytest.approx(60 / math.log(2) / 75)
    assert (result.tokens, result.text_bytes) == (25, 75)
    assert result.noise_error == 0.0
    # I40: one nat a token of 4.2278 bytes.
    one = summarize(np.array([[1e4]]), np.array([10_000]), 42_278, is_bound=False)
    assert one.bits_per_byte == pytest.approx(0.34124, rel=1e-4)


@pytest.mark.parametrize(("draws", "sequences"), [(0, None), (-1, None), (None, 0)])
def test_counts_below_one_are_refused_before_anything_is_read(tmp_path, draws, sequences):
    from pretrain.errors import ConfigError
    from pretrain.evaluation.run import evaluate_run

    with pytest.raises(ConfigError, match="allowed: 1 or more"):
        evaluate_run(tmp_path / "none", draws=draws, sequences=sequences)


@pytest.fixture(scope="module")
def stream(pool):
    from data_pipeline.shards.pool import TokenPool
    from data_pipeline.stream.budget import Budget
    from data_pipeline.stream.stream import TokenStream

    tokens = TokenPool(pool / "validation" / "manifest.json")
    # 22 sequences, the last with 10 tokens.
    return TokenStream(
        tokens, Budget(21 * 64 + 10, 64, 10**6), seed=0, order="sequential", epochs=1
    )


def masked(pool, window=16):
    from pretrain.config.run import ModelConfig
    from pretrain.data import token_space

    space = token_space(load_tokenizer(pool / "tokenizer.model"), ModelConfig())
    return build_objective(objectives.make(name="masked", time_window=window), space)


def score(batch):
    """Losses that depend on token and place: any other choice of masks would show."""
    loss = 1.0 + ((batch.targets + batch.rows % batch.ids.shape[1]) % 7).double()
    total = torch.zeros(batch.ids.shape[0], dtype=torch.float64)
    return total.index_add(0, batch.sequence, loss * batch.weight)


def evaluate(pool, stream, window=16, score=score, **settings):
    return evaluate_likelihood(
        masked(pool, window),
        stream,
        score,
        EvaluationConfig(**{"draws": 3, **settings}),
        TextBytes(load_tokenizer(pool / "tokenizer.model")),
        device=torch.device("cpu"),
    )


def test_batch_size_and_training_window_change_nothing(pool, stream):
    whole = evaluate(pool, stream, batch_size=22)
    assert whole.tokens == 21 * 64 + 10
    assert whole.sequences == 22
    for size in (1, 5, 16, 64):
        assert evaluate(pool, stream, batch_size=size) == whole
    # Two runs that trained with other windows still see the same evaluation noise.
    assert evaluate(pool, stream, batch_size=22, window=256) == whole


def test_a_constant_loss_is_measured_exactly(pool, stream):
    def constant(batch):
        total = torch.zeros(batch.ids.shape[0], dtype=torch.float64)
        return total.index_add(0, batch.sequence, batch.weight * math.log(507))

    result = evaluate(pool, stream, score=constant, draws=1)
    assert result.nats_per_token == pytest.approx(math.log(507), rel=1e-12)
    assert result.standard_error < 1e-9
