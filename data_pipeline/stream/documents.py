"""Document boundaries: found by the separators in the tokens, with an index for counting.

`packed` lets a sequence attend across documents. `masked` keeps them apart: every token belongs
to the segment of its document, and the separator closes its segment without being scored, so a
likelihood is then *given the lengths*. The separator stays in `tokens` although it is invalid: the
autoregressive shift puts it in front of the next document, where it opens the next segment.
"""

from __future__ import annotations

from hashlib import file_digest
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from data_pipeline.errors import ShardError
from data_pipeline.regular import open_regular
from data_pipeline.shards.manifest import Manifest
from data_pipeline.stream.order import IntArray

DocumentMode = Literal["packed", "masked"]


def segments(tokens: NDArray[Any], doc_id: int) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    """Segment number of every token, int32 [b, s], and mask of the separators, bool [b, s].

    A separator belongs to the document it ends; the segment of a token is the number of separators
    strictly before it in the row.
    """
    separators = tokens == doc_id
    before = np.cumsum(separators, axis=-1, dtype=np.int32)
    return before - separators, separators


def _ascending(positions: NDArray[Any], stop: int) -> bool:
    """True if positions rise strictly and are below `stop`."""
    return int(positions[-1]) < stop and bool((positions[1:] > positions[:-1]).all())


class SeparatorIndex:
    """Pool positions of all separators: 8 bytes a document on disk, memory-mapped."""

    def __init__(self, manifest: Manifest, path: Path, *, verify: bool) -> None:
        """Map `path`; ShardError if it is missing, has a wrong size or (`verify`) wrong bytes."""
        record = manifest.documents
        try:
            if record.count == 0:
                self.positions = np.empty(0, "<u8")
                return
            with open_regular(path) as file:
                if verify and file_digest(file, "sha256").hexdigest() != record.sha256:
                    raise ShardError(f"{path}: content differs from the manifest; restore the file")
                self.positions = np.memmap(file, "<u8", "r")
        except (OSError, ValueError) as error:
            raise ShardError(f"cannot read the document index {path}: {error}") from error
        if len(self.positions) != record.count:
            raise ShardError(f"{path}: {len(self.positions):,} documents, not {record.count:,}")
        if verify and not _ascending(self.positions, manifest.tokens):
            raise ShardError(f"{path} does not list places in its pool; prepare the data again")

    def count(self, start: IntArray, stop: IntArray) -> IntArray:
        """Count the separators in each [start, stop), int64 [k]."""
        first = np.searchsorted(self.positions, start.astype(np.uint64))
        last = np.searchsorted(self.positions, stop.astype(np.uint64))
        return (last - first).astype(np.int64)
