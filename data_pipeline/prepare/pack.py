"""Third stage of a preparation: the tokens of all buckets, in sequence, into shards and a manifest.

One process writes them (1 GB/s with both hashes, far faster than tokenising). Each finished shard
is noted in `progress.jsonl`; a restart keeps those whose size and hash still agree.
"""

from __future__ import annotations

import json
import os
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.errors import CorpusError
from data_pipeline.prepare.collect import EXAMPLES
from data_pipeline.prepare.settings import PrepareSettings
from data_pipeline.prepare.tokenise import Split, token_dtype, token_file
from data_pipeline.progress import Progress
from data_pipeline.shards.files import atomic_file, write_atomically
from data_pipeline.shards.manifest import (
    DocumentIndex,
    Manifest,
    PackingRecord,
    RoundTrip,
    ShardRecord,
    SourceRecord,
    SplitRule,
)
from data_pipeline.shards.pool import shard_problem
from data_pipeline.shards.shards import ShardLayout, write_shard
from data_pipeline.tokenizer import Tokenizer

LARGE_POOL_TOKENS = 200_000_000


class _Concatenation:
    """Token files of all buckets as one array, read in slices."""

    def __init__(self, folder: Path, split: str, lengths: list[int], dtype: np.dtype[Any]) -> None:
        self._paths = [token_file(folder, split, b) for b in range(len(lengths))]
        self._starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        self._dtype = dtype
        self.tokens = int(self._starts[-1])

    def read(self, start: int, stop: int) -> NDArray[Any]:
        out, filled = np.empty(stop - start, self._dtype), 0
        bucket = int(np.searchsorted(self._starts, start, "right")) - 1
        while filled < len(out):
            offset = start + filled - int(self._starts[bucket])
            count = min(
                int(self._starts[bucket + 1] - self._starts[bucket]) - offset, len(out) - filled
            )
            if count > 0:
                with open(self._paths[bucket], "rb") as file:
                    file.seek(offset * self._dtype.itemsize)
                    part = np.fromfile(file, self._dtype, count)
                out[filled : filled + count] = part
                filled += count
            bucket += 1
        return out


def pack_split(
    split: Split,
    settings: PrepareSettings,
    tokenizer: Tokenizer,
    results: list[dict[str, Any]],
    folder: Path,
    progress: Progress,
) -> Path:
    """Write one pool from the buckets' `results` and token files in `folder`.

    Returns the path of its manifest; CorpusError if the pool would be empty.
    """
    lengths = [result[split]["tokens"] for result in results]
    dtype = np.dtype(token_dtype(tokenizer.vocab_size))
    stream = _Concatenation(folder, split, lengths, dtype)
    if stream.tokens == 0:
        raise CorpusError(
            f"the {split} pool would be empty: {settings.validation_fraction:.2%} of the documents "
            "go to validation; give more documents, another validation_fraction, or split long "
            "plain text into documents with chunk_characters"
        )
    out = settings.out / split
    out.mkdir(parents=True, exist_ok=True)
    per_shard = settings.members_per_shard or (32 if stream.tokens < LARGE_POOL_TOKENS else 128)
    layout = ShardLayout(split, dtype, settings.member_bytes // dtype.itemsize, per_shard)
    shards = _write_shards(out, folder, layout, stream, progress)
    manifest = Manifest(
        split=split,
        dtype=token_dtype(tokenizer.vocab_size),
        tokens=stream.tokens,
        raw_bytes=sum(c["raw_bytes"] for r in results for c in r[split]["sources"].values()),
        member_tokens=layout.member_tokens,
        members_per_shard=per_shard,
        tokenizer=tokenizer.record,
        packing=PackingRecord(seed=settings.seed),
        split_rule=SplitRule(validation_below=f"0x{validation_below(settings):016x}"),
        round_trip=_round_trip(results, split),
        sources=_sources(results, split, settings),
        shards=tuple(shards),
        documents=_write_document_index(out, stream, layout, tokenizer.doc_id),
    )
    write_atomically(out / "manifest.json", manifest.to_json())
    return out / "manifest.json"


def validation_below(settings: PrepareSettings) -> int:
    """Threshold of the split hash, below which documents go to validation."""
    return int(settings.validation_fraction * 2**64)


def _write_shards(
    out: Path, folder: Path, layout: ShardLayout, stream: _Concatenation, progress: Progress
) -> list[ShardRecord]:
    """Write the shards that an earlier start has not finished; the records of all."""
    journal = folder / f"{layout.split}-progress.jsonl"
    kept = _finished_shards(journal, out)
    count = -(-stream.tokens // layout.shard_tokens)
    progress.start(f"writing {layout.split} shards", stream.tokens, "tokens")
    shards = []
    for index in range(count):
        record = kept.get(layout.name(index))
        if record is None:
            record = write_shard(out, layout, index, stream.read, stream.tokens)
            with open(journal, "a", encoding="utf-8") as file:
                file.write(record.model_dump_json() + "\n")
                file.flush()
                os.fsync(file.fileno())
        shards.append(record)
        progress.advance(record.tokens)
    return shards


def _finished_shards(journal: Path, out: Path) -> dict[str, ShardRecord]:
    """Shards that an earlier start finished and that are still intact, by name."""
    kept: dict[str, ShardRecord] = {}
    if not journal.exists():
        return kept
    whole_lines = journal.read_text(encoding="utf-8").rpartition("\n")[0]
    for line in whole_lines.splitlines():
        try:
            record = ShardRecord.model_validate_json(line)
        except ValueError:
            continue  # two starts' lines can touch when the first was killed while writing
        if shard_problem(out, record, full=True) is None:
            kept[record.name] = record
    return kept


def _write_document_index(
    out: Path, stream: _Concatenation, layout: ShardLayout, doc_id: int
) -> DocumentIndex:
    """Write the pool positions of all separators."""
    path, digest, count = out / "documents.bin", sha256(), 0
    with atomic_file(path) as file:
        for start in range(0, stream.tokens, layout.member_tokens):
            block = stream.read(start, min(start + layout.member_tokens, stream.tokens))
            found = (start + np.flatnonzero(block == doc_id)).astype("<u8").tobytes()
            file.write(found)
            digest.update(found)
            count += len(found) // 8
    return DocumentIndex(count=count, sha256=digest.hexdigest())


def _round_trip(results: list[dict[str, Any]], split: str) -> RoundTrip:
    checked = sum(c["documents"] for r in results for c in r[split]["sources"].values())
    examples = [name for r in results for name in r[split]["examples"]]
    return RoundTrip(
        checked=checked,
        failed=sum(r[split]["failed"] for r in results),
        examples=tuple(examples[:EXAMPLES]),
    )


def _sources(
    results: list[dict[str, Any]], split: str, settings: PrepareSettings
) -> tuple[SourceRecord, ...]:
    records = []
    for index, source in enumerate(settings.sources):
        counts = {"documents": 0, "raw_bytes": 0, "tokens": 0}
        for result in results:
            for key, value in result[split]["sources"].get(str(index), {}).items():
                counts[key] += value
        records.append(SourceRecord(name=source.label, license=source.license, **counts))
    return tuple(records)


def manifest_summary(path: Path) -> dict[str, Any]:
    """Entry of a finished pool in the report."""
    manifest = Manifest.load(path)
    return {
        "manifest_sha256": manifest.sha256,
        "tokens": manifest.tokens,
        "raw_bytes": manifest.raw_bytes,
        "bytes_per_token": round(manifest.bytes_per_token, 4),
        "documents": manifest.documents.count,
        "shards": len(manifest.shards),
        "round_trip": json.loads(manifest.round_trip.model_dump_json()),
    }
