"""Sizes of a configuration: parameters, operations of a token, unique tokens and sequences."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from pretrain.config.run import Config
from pretrain.model.size import parameter_count


def parameters(config: Config) -> tuple[int, int]:
    """Number of parameters, and of those in embedding and head matrices."""
    padded = config.model.padded_vocab_size(_vocab_size(config.data.tokenizer))
    total = parameter_count(config.model, padded)
    if not config.objective.scores_in_chunks:  # only such a family may have a network of its own
        from pretrain.planning.plan import objective_cost

        network = objective_cost(config, padded).auxiliary
        total += 0 if network is None else network.parameters
    return total, padded * config.model.hidden_size * (1 if config.model.tie_embeddings else 2)


@cache
def _vocab_size(tokenizer: Path) -> int:
    from data_pipeline.tokenizer import load_tokenizer

    return load_tokenizer(tokenizer).vocab_size


def counted_flops_per_token(config: Config) -> float:
    """Training FLOPs of a token with attention and head; imports torch."""
    from pretrain.planning.plan import costs, vocabulary

    return costs(config, vocabulary(config, None)[0]).flops_per_token


def unique_tokens(config: Config) -> int:
    """Number U of unique tokens of a configuration."""
    return sum(tokens for tokens, _ in _budgets(config))


def sequences(config: Config) -> int:
    """Number of sequences of an epoch."""
    return sum(number for _, number in _budgets(config))


def _budgets(config: Config) -> list[tuple[int, int]]:
    """Unique tokens and sequences of each pool."""
    from data_pipeline.stream.budget import Budget
    from data_pipeline.stream.open_stream import read_pools

    d = config.data
    found = []
    for pool in read_pools(d.train, d.unique_tokens, d.order):
        held = pool.manifest.tokens
        budget = Budget(pool.unique_tokens, d.seq_length, held)
        found.append((pool.unique_tokens or held, budget.sequences))
    return found
