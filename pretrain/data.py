"""Where the data pipeline meets training: streams of a configuration, clean batches of torch."""

from __future__ import annotations

import torch

from data_pipeline.budget import Budget
from data_pipeline.pool import TokenPool
from data_pipeline.stream import Stream, TokenBatch, TokenStream
from data_pipeline.tokenizer import Tokenizer
from pretrain.batch import CleanBatch
from pretrain.config import Config, ModelConfig
from pretrain.vocabulary import TokenSpace


def training_stream(config: Config) -> TokenStream:
    """The budget of the run, repeated; raises DataError for bad shards or too large a budget."""
    d = config.data
    pool = TokenPool(d.train, verify=d.verify, tokens=d.unique_tokens)
    budget = Budget(d.unique_tokens, d.seq_length, pool.manifest.tokens)
    return TokenStream(
        pool,
        budget,
        seed=config.run.seed,
        order=d.order,
        documents=d.documents,
        epochs=d.epochs,
    )


def validation_stream(config: Config) -> TokenStream:
    """Every validation sequence once, in stored order."""
    d = config.data
    pool = TokenPool(d.validation, verify=d.verify)
    budget = Budget(None, d.seq_length, pool.manifest.tokens)
    return TokenStream(pool, budget, seed=0, order="sequential", documents=d.documents, epochs=1)


def clean_batch(tokens: TokenBatch) -> CleanBatch:
    """The same rows as torch tensors on the CPU, sharing their memory."""
    return CleanBatch(
        tokens=torch.from_numpy(tokens.tokens),
        position=torch.from_numpy(tokens.position),
        segment=torch.from_numpy(tokens.segment),
        valid=torch.from_numpy(tokens.valid),
        all_valid=tokens.all_valid,
        one_segment=tokens.one_segment,
    )


def token_space(tokenizer: Tokenizer, model: ModelConfig) -> TokenSpace:
    """Ids and targets of a tokenizer, for a model of this configuration."""
    return TokenSpace(
        vocab_size=tokenizer.vocab_size,
        padded_vocab_size=model.padded_vocab_size(tokenizer.vocab_size),
        pad_id=tokenizer.pad_id,
        mask_id=tokenizer.mask_id,
        doc_id=tokenizer.doc_id,
        never_targets=tuple(tokenizer.never_targets),
    )


def bytes_per_token(stream: Stream) -> float:
    """UTF-8 bytes of text for each token of the stream's pool, separators counted as tokens."""
    assert isinstance(stream, TokenStream)
    manifest = stream.pool.manifest
    return manifest.raw_bytes / manifest.tokens
