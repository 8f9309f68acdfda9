"""The same tokens in the format of each reader: flat file, pool, webdataset, LitData, MosaicML."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np

SEQ_LENGTH = 2048
GROUP = 256
"""Sequences of a large webdataset member."""
SHARD_BYTES = 32 << 20


def tokens_file(root: Path) -> Path:
    """The same tokens as one flat file."""
    return root / "tokens.bin"


def write_pool(tokens: np.ndarray, folder: Path) -> None:
    """A `tokens-tar/1` pool of `tokens`."""
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
    from data_pipeline.shards.shards import MEMBER_BYTES, ShardLayout, write_shard

    folder.mkdir(parents=True)
    layout = ShardLayout("train", np.dtype("<u2"), MEMBER_BYTES // 2, SHARD_BYTES // MEMBER_BYTES)
    count = -(-len(tokens) // layout.shard_tokens)
    shards = [
        write_shard(folder, layout, i, lambda a, b: tokens[a:b], len(tokens)) for i in range(count)
    ]
    (folder / "documents.bin").write_bytes(b"")
    tokenizer = TokenizerRecord(
        kind="sentencepiece",
        sha256="0" * 64,
        pieces_sha256="0" * 64,
        vocab_size=32000,
        pad_id=0,
        mask_id=4,
        doc_id=5,
        never_targets=(0, 1, 2, 3, 4),
    )
    source = SourceRecord(name="random", license="-", documents=1, raw_bytes=1, tokens=len(tokens))
    empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    manifest = Manifest(
        split="train",
        dtype="<u2",
        tokens=len(tokens),
        raw_bytes=1,
        member_tokens=layout.member_tokens,
        members_per_shard=layout.members_per_shard,
        tokenizer=tokenizer,
        packing=PackingRecord(seed=0),
        split_rule=SplitRule(validation_below="0x0"),
        round_trip=RoundTrip(checked=0, failed=0),
        sources=(source,),
        shards=tuple(shards),
        documents=DocumentIndex(count=0, sha256=empty),
    )
    write_atomically(folder / "manifest.json", manifest.to_json())


def write_webdataset(tokens: np.ndarray, folder: Path, group: int) -> None:
    """webdataset's own writer, `group` sequences a member."""
    import webdataset

    folder.mkdir(parents=True)
    rows = tokens.reshape(-1, SEQ_LENGTH)
    pattern = str(folder / "s-%06d.tar")
    with webdataset.ShardWriter(pattern, maxsize=SHARD_BYTES, maxcount=10**9, verbose=0) as sink:
        for i in range(0, len(rows), group):
            sink.write({"__key__": f"{i:09d}", "tok.bin": rows[i : i + group].tobytes()})


def write_litdata(tokens: np.ndarray, folder: Path) -> None:
    """LitData chunks for its TokensLoader."""
    import torch
    from litdata.streaming.cache import Cache
    from litdata.streaming.item_loader import TokensLoader

    folder.mkdir(parents=True)
    chunk = SHARD_BYTES // 2 // SEQ_LENGTH * SEQ_LENGTH
    cache = Cache(str(folder), chunk_size=chunk, item_loader=TokensLoader(block_size=SEQ_LENGTH))
    step = GROUP * SEQ_LENGTH
    for number, start in enumerate(range(0, len(tokens), step)):
        cache[number] = torch.from_numpy(tokens[start : start + step])
    cache.done()
    cache.merge()


def write_mosaic(tokens: np.ndarray, folder: Path) -> None:
    """MosaicML shards, one sequence a sample."""
    from streaming import MDSWriter

    columns = {"tokens": f"ndarray:uint16:{SEQ_LENGTH}"}
    with MDSWriter(out=str(folder), columns=columns, size_limit=SHARD_BYTES) as sink:
        for row in tokens.reshape(-1, SEQ_LENGTH):
            sink.write({"tokens": row})


def prepare_sets(root: Path, count: int) -> dict[str, str]:
    """Write every format that can be written; the reason for each that cannot."""
    tokens = np.random.default_rng(0).integers(
        6, 32000, count // (GROUP * SEQ_LENGTH) * GROUP * SEQ_LENGTH
    )
    tokens = tokens.astype("<u2")
    root.mkdir(parents=True, exist_ok=True)
    tokens.tofile(tokens_file(root))
    missing = {}
    writers: dict[str, Callable[[Path], None]] = {
        "epochal": lambda p: write_pool(tokens, p),
        "wds-group": lambda p: write_webdataset(tokens, p, GROUP),
        "wds-single": lambda p: write_webdataset(tokens, p, 1),
        "litdata": lambda p: write_litdata(tokens, p),
        "mosaic": lambda p: write_mosaic(tokens, p),
    }
    for name, write in writers.items():
        if (root / name).exists():
            continue
        try:
            write(root / name)
        except Exception as error:  # a peer that cannot be used is named, not fatal
            missing[name] = f"{type(error).__name__}: {error}"
            shutil.rmtree(root / name, ignore_errors=True)
    return missing
