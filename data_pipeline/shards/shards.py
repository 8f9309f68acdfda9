"""The format `tokens-tar/1`: plain ustar shards whose members hold tokens at computable offsets.

    shard of m members = header . tokens . header . tokens . ... . header . tokens . end blocks
    header of 512 bytes, payload of 1 MiB (the pool's last one is shorter, padded to 512 bytes)

A member is 1 MiB of little-endian token ids, so the tar overhead is 0.05 % and any token is found
by arithmetic, without an index; any tar tool and `webdataset` read the same file. Members carry no
time, owner or extended header, so the same tokens give the same bytes.
"""

from __future__ import annotations

import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import xxhash
from numpy.typing import NDArray

from data_pipeline.shards.files import atomic_file
from data_pipeline.shards.manifest import END_BYTES, HEADER_BYTES, ShardRecord

MEMBER_BYTES = 1 << 20


def member_header(number: int, payload_bytes: int) -> bytes:
    """Ustar header of the pool's member `number`, 512 bytes."""
    info = tarfile.TarInfo(f"{number:09d}.tok.bin")
    info.size, info.mode, info.mtime = payload_bytes, 0o444, 0
    header = info.tobuf(tarfile.USTAR_FORMAT)
    assert len(header) == HEADER_BYTES
    return header


@dataclass(frozen=True)
class ShardLayout:
    """Division of a pool into members and shards."""

    split: str
    dtype: np.dtype[Any]
    member_tokens: int
    members_per_shard: int

    @property
    def shard_tokens(self) -> int:
        """Tokens of a full shard."""
        return self.member_tokens * self.members_per_shard

    def name(self, index: int) -> str:
        """File name of shard `index`."""
        return f"{self.split}-{index:06d}.tar"


class _HashingFile:
    """Writer to a file that keeps both hashes of everything written."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._sha, self._xxh = sha256(), xxhash.xxh3_128()
        self.bytes = 0

    def write(self, block: bytes | memoryview) -> None:
        self._file.write(block)
        self._sha.update(block)
        self._xxh.update(block)
        self.bytes += len(block)

    @property
    def hashes(self) -> tuple[str, str]:
        return self._sha.hexdigest(), self._xxh.hexdigest()


def write_shard(
    folder: Path,
    layout: ShardLayout,
    index: int,
    read: Callable[[int, int], NDArray[Any]],
    stop: int,
) -> ShardRecord:
    """Write shard `index` of a pool of `stop` tokens, which `read(first, last)` returns in slices.

    The file appears under its name only when it is complete and synced. OSError (full disk) leaves
    no temporary file behind.
    """
    first = index * layout.shard_tokens
    last = min(first + layout.shard_tokens, stop)
    path, members = folder / layout.name(index), []
    with atomic_file(path) as file:
        out = _HashingFile(file)
        for start in range(first, last, layout.member_tokens):
            tokens = read(start, min(start + layout.member_tokens, last))
            payload = np.ascontiguousarray(tokens, layout.dtype).data.cast("B")
            out.write(member_header(start // layout.member_tokens, len(payload)))
            out.write(payload)
            out.write(bytes(-len(payload) % HEADER_BYTES))
            members.append(xxhash.xxh3_64_hexdigest(payload))
        out.write(bytes(END_BYTES))
    digest, fast = out.hashes
    return ShardRecord(
        name=path.name,
        bytes=out.bytes,
        tokens=last - first,
        first=first,
        sha256=digest,
        xxh3=fast,
        member_xxh3=tuple(members),
    )
