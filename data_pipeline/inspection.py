"""Looking into a pool: what a sequence says, where its documents begin."""

from __future__ import annotations

from typing import Any

import numpy as np

from data_pipeline.documents import segments
from data_pipeline.errors import DataError, TokenizerError
from data_pipeline.manifest import Manifest
from data_pipeline.pool import TokenPool
from data_pipeline.tokenizer import Tokenizer


def check_tokenizer(manifest: Manifest, tokenizer: Tokenizer) -> None:
    """`TokenizerError` unless the shards were written with this tokenizer."""
    written = manifest.tokenizer
    if tokenizer.pieces_sha256 != written.pieces_sha256:
        raise TokenizerError(
            f"the {manifest.split} shards were written with another tokenizer: pieces "
            f"{written.pieces_sha256[:16]} ({written.vocab_size} ids) in the manifest, "
            f"{tokenizer.pieces_sha256[:16]} ({tokenizer.vocab_size} ids) given; use the "
            "tokenizer.model beside the shards"
        )


def describe_sequence(
    pool: TokenPool, tokenizer: Tokenizer, sequence: int, seq_length: int
) -> dict[str, Any]:
    """One sequence of the pool: text with visible special ids, and its documents."""
    total = -(-pool.num_tokens // seq_length)
    if not 0 <= sequence < total:
        raise DataError(
            f"sequence {sequence:,} does not exist: the pool holds {total:,} sequences of "
            f"{seq_length} tokens"
        )
    start = sequence * seq_length
    tokens = pool.tokens(start, min(start + seq_length, pool.num_tokens))
    segment, separators = segments(tokens[None].astype(np.int64), tokenizer.doc_id)
    starts = np.flatnonzero(np.diff(segment[0], prepend=-1))
    return {
        "sequence": sequence,
        "pool_tokens": [start, start + len(tokens)],
        "documents": int(segment[0, -1]) + 1 if len(tokens) else 0,
        "document_starts": starts.tolist(),
        "separators": np.flatnonzero(separators[0]).tolist(),
        "text": tokenizer.decode_visible(tokens.tolist()),
    }
