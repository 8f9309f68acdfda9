"""Second stage of a preparation: buckets of documents into tokens, one job a bucket.

Copies are dropped, the split is decided by content, every document is encoded, followed by one
separator, and decoded again to see whether the text comes back.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from data_pipeline.errors import TokenizerError
from data_pipeline.prepare.collect import EXAMPLES, Record, read_bucket, split_hash
from data_pipeline.shards.files import write_atomically
from data_pipeline.tokenizer import Tokenizer, load_tokenizer

Split = Literal["train", "validation"]
SPLITS: tuple[Split, ...] = ("train", "validation")


@dataclass(frozen=True)
class Buckets:
    """The collected documents in keyed order, bucket by bucket."""

    folder: str
    runs: tuple[tuple[int, str], ...]
    """(unit number, run name)."""
    sources: tuple[int, ...]
    """Source index of every unit number."""
    count: int
    """Number of buckets."""
    validation_below: int
    """Documents whose split hash is below this go to validation."""
    dropped: frozenset[str] = frozenset()
    """Content keys, hexadecimal, of documents that are left out."""

    def split(self, record: Record) -> Split:
        """Split of a document, decided by its content alone."""
        return SPLITS[split_hash(record.content) < self.validation_below]

    def unique(self, bucket: int) -> Iterator[tuple[Record, int]]:
        """Yield the distinct documents of a bucket, each with its number of further copies."""
        previous, copies = None, 0
        for record in read_bucket(Path(self.folder), list(self.runs), bucket, self.count):
            if record.content.hex() in self.dropped:
                continue
            if previous is not None and record.content == previous.content:
                copies += 1
                continue
            if previous is not None:
                yield previous, copies
            previous, copies = record, 0
        if previous is not None:
            yield previous, copies

    def training_texts(self, max_bytes: int) -> Iterator[str]:
        """Yield distinct training documents until `max_bytes` bytes: a uniform sample."""
        total = 0
        for bucket in range(self.count):
            for record, _ in self.unique(bucket):
                if self.split(record) == "train":
                    yield record.text.decode()
                    total += len(record.text)
                    if total >= max_bytes:
                        return


@dataclass(frozen=True)
class TokeniseJob:
    """Job of tokenising one bucket."""

    buckets: Buckets
    bucket: int
    tokenizer: str
    folder: str


def tokenise_bucket(job: TokeniseJob) -> dict[str, Any]:
    """Write the token files of a bucket and return its counts; a finished bucket is not redone."""
    done = Path(job.folder) / f"{job.bucket:05d}.json"
    if done.exists():
        return json.loads(done.read_text())
    tokenizer = _tokenizer(job.tokenizer)
    dtype = np.dtype(token_dtype(tokenizer.vocab_size))
    parts: dict[Split, list[NDArray[Any]]] = {split: [] for split in SPLITS}
    tallies = {split: _Tally() for split in SPLITS}
    duplicates: dict[str, int] = {}
    for record, copies in job.buckets.unique(job.bucket):
        source = str(job.buckets.sources[record.unit])
        duplicates[source] = duplicates.get(source, 0) + copies
        ids = np.array([*tokenizer.encode(record.text.decode()), tokenizer.doc_id], np.int64)
        _check_ids(ids, tokenizer, record)
        split = job.buckets.split(record)
        parts[split].append(ids.astype(dtype))
        faithful = tokenizer.decode(ids[:-1].tolist()).encode() == record.text
        tallies[split].add(source, record, len(ids), faithful=faithful)
    for split in SPLITS:
        joined = np.concatenate([np.empty(0, dtype), *parts[split]])
        write_atomically(token_file(Path(job.folder), split, job.bucket), joined.tobytes())
    result: dict[str, Any] = {split: tallies[split].to_dict() for split in SPLITS}
    result["duplicates"] = duplicates
    write_atomically(done, json.dumps(result))
    return result


class _Tally:
    """Counts of one split in one bucket."""

    def __init__(self) -> None:
        self.sources: dict[str, dict[str, int]] = {}
        self.failed = 0
        self.examples: list[str] = []

    def add(self, source: str, record: Record, tokens: int, *, faithful: bool) -> None:
        counts = self.sources.setdefault(source, {"documents": 0, "raw_bytes": 0, "tokens": 0})
        counts["documents"] += 1
        counts["raw_bytes"] += len(record.text)
        counts["tokens"] += tokens
        if not faithful:
            self.failed += 1
            self.examples += [record.id] if len(self.examples) < EXAMPLES else []

    def to_dict(self) -> dict[str, Any]:
        tokens = sum(counts["tokens"] for counts in self.sources.values())
        return {
            "sources": self.sources,
            "failed": self.failed,
            "examples": self.examples,
            "tokens": tokens,
        }


def token_dtype(vocab_size: int) -> Literal["<u2", "<u4"]:
    """Stored type of a token: two bytes where every id fits, else four."""
    return "<u2" if vocab_size <= 1 << 16 else "<u4"


def token_file(folder: Path, split: str, bucket: int) -> Path:
    """Path of the tokens of one bucket."""
    return folder / f"{split}-{bucket:05d}.bin"


@lru_cache(maxsize=1)
def _tokenizer(path: str) -> Tokenizer:
    return load_tokenizer(Path(path))


def _check_ids(ids: NDArray[np.int64], tokenizer: Tokenizer, record: Record) -> None:
    """Raise TokenizerError for a document with ids that no target can take, or with a separator."""
    forbidden = np.isin(ids[:-1], [*tokenizer.never_targets, tokenizer.doc_id])
    if forbidden.any():
        piece = tokenizer.piece(int(ids[:-1][forbidden][0]))
        raise TokenizerError(
            f"document {record.id} encodes to the special piece {piece!r}, which text must not "
            "produce; use a tokenizer with byte fallback whose special symbols are control symbols"
        )
