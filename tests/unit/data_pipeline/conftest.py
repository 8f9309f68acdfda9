"""Natural texts with a tokenizer, and small pools with known tokens, by the product's writer."""

from __future__ import annotations

from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.corpus.builtin import builtin_documents
from data_pipeline.shards.files import write_atomically
from data_pipeline.shards.manifest import (
    DocumentIndex,
    Manifest,
    PackingRecord,
    RoundTrip,
    SourceRecord,
    SplitRule,
    TokenizerRecord,
)
from data_pipeline.shards.shards import ShardLayout, write_shard
from data_pipeline.tokenizer import train_sentencepiece

PAD, MASK, DOC, VOCAB = 0, 4, 5, 60000

PoolMaker = Callable[..., tuple[Path, np.ndarray]]


def build_pool(
    folder: Path, tokens: np.ndarray, *, member_tokens: int = 512, per_shard: int = 3
) -> Path:
    """Write `tokens` as a pool and return its manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    dtype = np.dtype("<u2")
    layout = ShardLayout("train", dtype, member_tokens, per_shard)
    count = -(-len(tokens) // layout.shard_tokens)
    shards = [
        write_shard(folder, layout, i, lambda a, b: tokens[a:b], len(tokens)) for i in range(count)
    ]
    separators = np.flatnonzero(tokens == DOC).astype("<u8").tobytes()
    write_atomically(folder / "documents.bin", separators)
    tokenizer = TokenizerRecord(
        kind="sentencepiece",
        sha256="0" * 64,
        pieces_sha256="1" * 64,
        vocab_size=VOCAB,
        pad_id=PAD,
        mask_id=MASK,
        doc_id=DOC,
        never_targets=(0, 1, 2, 3, 4),
    )
    source = SourceRecord(name="made up", license="-", documents=1, raw_bytes=1, tokens=len(tokens))
    manifest = Manifest(
        split="train",
        dtype="<u2",
        tokens=len(tokens),
        raw_bytes=3 * len(tokens),
        member_tokens=member_tokens,
        members_per_shard=per_shard,
        tokenizer=tokenizer,
        packing=PackingRecord(seed=1),
        split_rule=SplitRule(validation_below="0x0"),
        round_trip=RoundTrip(checked=1, failed=0),
        sources=(source,),
        shards=tuple(shards),
        documents=DocumentIndex(count=len(separators) // 8, sha256=sha256(separators).hexdigest()),
    )
    write_atomically(folder / "manifest.json", manifest.to_json())
    return folder / "manifest.json"


@pytest.fixture
def make_pool(tmp_path: Path) -> PoolMaker:
    """A pool of `count` random tokens with separators about every `document` tokens."""

    def make(
        count: int = 5000, *, document: int = 37, seed: int = 0, name: str = "pool", **layout: Any
    ) -> tuple[Path, np.ndarray]:
        rng = np.random.default_rng(seed)
        tokens = rng.integers(6, VOCAB, count).astype("<u2")
        tokens[rng.random(count) < 1 / document] = DOC
        return build_pool(tmp_path / name, tokens, **layout), tokens

    return make


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """120 distinct short documents of natural text."""
    return [text[:1500] for _, (_, text) in zip(range(120), builtin_documents(), strict=False)]


@pytest.fixture(scope="session")
def tokenizer_file(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "t.model"
    path.write_bytes(train_sentencepiece(texts, vocab_size=700, model_type="bpe"))
    return path
