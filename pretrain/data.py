"""Bridge from the data pipeline to training: streams of a configuration, batches as tensors."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist

from data_pipeline.errors import DataError
from data_pipeline.shards.cache import Cache
from data_pipeline.shards.pool import TokenPool, Verify
from data_pipeline.stream.budget import Budget
from data_pipeline.stream.mixture import MixtureStream
from data_pipeline.stream.open_stream import open_stream
from data_pipeline.stream.stream import TokenBatch, TokenStream
from data_pipeline.tokenizer import Tokenizer
from pretrain.batch import CleanBatch
from pretrain.config.run import Config, ModelConfig
from pretrain.vocabulary import TokenSpace

DEFAULT_CACHE = Path("~/.cache/epochal/shards")
"""Folder for downloaded shards where the configuration names none."""


def open_streams(
    config: Config, local_rank: int
) -> tuple[TokenStream | MixtureStream, TokenStream]:
    """Open the training and validation streams on every rank, or raise one DataError on all ranks.

    The first rank of each machine reads (and downloads) every byte that `data.verify` asks for. The
    others, which share its disk, compare sizes afterwards.
    """
    streams = None
    for first in (True, False):
        problem: DataError | None = None
        if first == (local_rank == 0):
            try:
                verify = config.data.verify
                verify = "size" if verify == "full" and not first else verify
                streams = training_stream(config, verify), validation_stream(config, verify)
            except DataError as error:
                problem = error
        _raise_together(problem)
    assert streams is not None
    return streams


def _raise_together(problem: DataError | None) -> None:
    """Raise an error of any rank on every rank, so that no rank waits for one that has ended."""
    problems: list[DataError | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    for found in problems:
        if found is not None:
            raise found


def training_stream(config: Config, verify: Verify | None = None) -> TokenStream | MixtureStream:
    """Open the budget of the run, repeated; raise DataError for bad shards or too large a budget.

    `verify` replaces the configuration's.
    """
    d = config.data
    return open_stream(
        d.train,
        seed=config.run.seed,
        seq_length=d.seq_length,
        unique_tokens=d.unique_tokens,
        order=d.order,
        documents=d.documents,
        epochs=d.epochs,
        verify=verify or d.verify,
        cache=shard_cache(config),
    )


def shard_cache(config: Config) -> Cache:
    """Cache of downloaded shards; its folder is made when the first one is downloaded."""
    d = config.data
    return Cache((d.cache or DEFAULT_CACHE).expanduser(), d.cache_bytes)


def validation_stream(config: Config, verify: Verify | None = None) -> TokenStream:
    """Open every validation sequence once, in stored order.

    `verify` replaces the configuration's.
    """
    d = config.data
    pool = TokenPool(d.validation, verify=verify or d.verify, cache=shard_cache(config))
    budget = Budget(None, d.seq_length, pool.manifest.tokens)
    return TokenStream(pool, budget, seed=0, order="sequential", documents=d.documents, epochs=1)


def clean_batch(tokens: TokenBatch) -> CleanBatch:
    """Convert rows to torch tensors on the CPU that share their memory."""
    return CleanBatch(
        tokens=torch.from_numpy(tokens.tokens),
        position=torch.from_numpy(tokens.position),
        segment=torch.from_numpy(tokens.segment),
        valid=torch.from_numpy(tokens.valid),
        all_valid=tokens.all_valid,
        one_segment=tokens.one_segment,
    )


def token_space(tokenizer: Tokenizer, model: ModelConfig) -> TokenSpace:
    """Ids and possible targets of a tokenizer, for a model of this configuration."""
    return TokenSpace(
        vocab_size=tokenizer.vocab_size,
        padded_vocab_size=model.padded_vocab_size(tokenizer.vocab_size),
        pad_id=tokenizer.pad_id,
        mask_id=tokenizer.mask_id,
        doc_id=tokenizer.doc_id,
        never_targets=tuple(tokenizer.never_targets),
    )
