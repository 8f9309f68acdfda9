"""Near-duplicates: documents that resemble an earlier one, within and across the splits.

MinHash signatures of word 5-grams in an LSH index (datasketch). Documents are taken in keyed order,
validation first: a training document that resembles a validation document is contamination and is
removed from training, so that the validation pool stays what its content decided; a document that
resembles an earlier one of its own split is removed as a copy. The index holds a signature of every
kept document in memory (about 1 kB each), so this is for corpora up to some ten million documents.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash

from data_pipeline.errors import CorpusError
from data_pipeline.prepare.tokenise import Buckets, Split
from data_pipeline.progress import Progress

PERMUTATIONS = 128
SHINGLE_WORDS = 5
_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class NearDuplicates:
    """Content keys (hexadecimal) of documents to drop, by reason."""

    contaminated: tuple[str, ...]
    """Training documents that resemble a validation document."""
    copies: tuple[str, ...]
    """Documents that resemble an earlier one of the same split."""
    examples: tuple[tuple[str, str], ...]
    """Some (dropped id, resembled id)."""


def find_near_duplicates(
    buckets: Buckets, threshold: float, progress: Progress, examples: int = 5
) -> NearDuplicates:
    """Compare all documents; two are too similar from a Jaccard similarity of `threshold` on.

    CorpusError where the library datasketch is missing.
    """
    try:
        from datasketch import MinHashLSH
    except ImportError:
        raise CorpusError(
            "near-duplicate removal needs datasketch: pip install 'epochal[data]'"
        ) from None
    index = MinHashLSH(threshold=threshold, num_perm=PERMUTATIONS)
    signatures: dict[str, tuple[Any, Split]] = {}
    contaminated: list[str] = []
    copies: list[str] = []
    shown: list[tuple[str, str]] = []
    progress.start("comparing documents", None, "documents")
    for split, key, name, signature in _signatures(buckets):
        progress.advance(1)
        match = _closest(index.query(signature), signatures, signature, threshold)
        if match is None:
            index.insert(f"{key}:{name}", signature)
            signatures[f"{key}:{name}"] = (signature, split)
            continue
        (contaminated if signatures[match][1] != split else copies).append(key)
        if len(shown) < examples:
            shown.append((name, match.partition(":")[2]))
    return NearDuplicates(tuple(contaminated), tuple(copies), tuple(shown))


def _closest(
    candidates: list[str],
    signatures: dict[str, tuple[Any, Split]],
    signature: Any,
    threshold: float,
) -> str | None:
    """Most similar candidate of at least `threshold` (the index alone reports too many)."""
    scored = [(signatures[c][0].jaccard(signature), c) for c in sorted(candidates)]
    best = max(scored, default=(0.0, ""))
    return best[1] if best[0] >= threshold else None


def _signatures(buckets: Buckets) -> Iterator[tuple[Split, str, str, Any]]:
    """Yield (split, content key, id, signature) of every distinct document, validation first."""
    from datasketch import MinHash

    wanted: tuple[Split, ...] = ("validation", "train")
    for split in wanted:
        for bucket in range(buckets.count):
            for record, _ in buckets.unique(bucket):
                if buckets.split(record) != split:
                    continue
                signature = MinHash(PERMUTATIONS, seed=1, hashfunc=_as_is)
                signature.update_batch(shingles(record.text.decode()))
                yield split, record.content.hex(), record.id, signature


def shingles(text: str) -> list[int]:
    """32-bit hashes of the word 5-grams of a text, case and punctuation ignored."""
    words = _WORD.findall(text.lower())
    count = max(1, len(words) - SHINGLE_WORDS + 1)
    grams = {" ".join(words[i : i + SHINGLE_WORDS]) for i in range(count)}
    return sorted(xxhash.xxh32_intdigest(gram.encode()) for gram in grams)


def _as_is(value: int) -> int:
    return int(np.uint32(value))
