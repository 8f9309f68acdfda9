"""Random tokens, and configurations of runs that open no file: what a benchmark of a step needs."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from pretrain.batch import CleanBatch
from pretrain.config.compose import compose
from pretrain.config.run import Config
from pretrain.vocabulary import TokenSpace


def configuration(*overrides: str) -> Config:
    """The configuration of `overrides`; the paths of its data are never opened."""
    paths = [f"data.{key}=unused" for key in ("train", "validation", "tokenizer")]
    return compose([*overrides, *paths])


def token_space(vocabulary: int) -> TokenSpace:
    """Ids of which the first five are never targets and the next separates documents."""
    return TokenSpace(vocabulary, vocabulary, 0, 4, 5, (0, 1, 2, 3, 4))


def random_tokens(
    space: TokenSpace, batch: int, length: int, generator: torch.Generator | None = None
) -> torch.Tensor:
    """int64 [batch, length] of text and separators."""
    return torch.randint(space.doc_id, space.vocab_size, (batch, length), generator=generator)


def clean_batch(tokens: torch.Tensor, position: torch.Tensor) -> CleanBatch:
    """Whole sequences [b, s] of packed documents at the run's positions [b]."""
    return CleanBatch(
        tokens=tokens,
        position=position,
        segment=torch.zeros_like(tokens, dtype=torch.int32),
        valid=torch.ones_like(tokens, dtype=torch.bool),
        all_valid=True,
    )


def same_tokens(space: TokenSpace, batch: int, length: int) -> Iterator[CleanBatch]:
    """The same tokens for ever, each time at the next positions of the run, so with new noise."""
    tokens = random_tokens(space, batch, length, torch.Generator().manual_seed(0))
    position = torch.arange(batch)
    while True:
        yield clean_batch(tokens, position)
        position = position + batch
