"""Random access to the tokens of a pool: shards memory-mapped at arithmetic offsets.

Nothing is loaded and nothing is indexed. Addresses are computed for thousands of sequences at once;
each is then one slice of a mapped shard, and a batch is one concatenation. Sequences that cross a
tar header (their length does not divide a member) take a slower path.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import xxhash
from numpy.typing import NDArray

from data_pipeline.errors import ShardError
from data_pipeline.regular import open_regular
from data_pipeline.shards.cache import Cache
from data_pipeline.shards.files import inside
from data_pipeline.shards.manifest import HEADER_BYTES, ShardRecord
from data_pipeline.shards.source import LocalSource, PoolSource, open_source

Verify = Literal["full", "size", "lazy", "off"]


@dataclass(frozen=True)
class Located:
    """Addresses of sequences, as plain lists, whose elements the reading loop gets fastest."""

    seq_length: int
    start: list[int]
    """Pool position of the first token."""
    shard: list[int]
    offset: list[int]
    """First token in the mapped shard, in tokens; -1 where the sequence is not one slice of it."""
    plain: bool
    """True if all of them are one slice each and need no check."""


class TokenPool:
    """The tokens of one manifest, or of its first `tokens` tokens."""

    def __init__(
        self,
        manifest_path: Path | str,
        verify: Verify = "full",
        tokens: int | None = None,
        *,
        cache: Cache | None = None,
        open_shards: int | None = None,
    ) -> None:
        """Check the shards that hold the first `tokens` tokens (default: all) before any is read.

        `full` hashes them, `size` compares sizes, `lazy` checks sizes now and each member's hash
        when it is first read, `off` checks nothing. ShardError lists every bad shard.

        A URL needs a `cache`: its shards are fetched, always checked, before any is read, or with
        `lazy` and `off` when they are first read. At most `open_shards` stay open (window orders).
        """
        self.source = open_source(manifest_path, cache, check=verify == "full")
        self.manifest = self.source.manifest()
        self.num_tokens: int = self.manifest.tokens
        """Tokens of the whole pool."""
        self._dtype = self.manifest.item_dtype
        self._item = self._dtype.itemsize
        self._stride = HEADER_BYTES + self.manifest.member_tokens * self._item
        self._maps = _MappedShards(self._map, self._unmap, open_shards)
        wanted = self.num_tokens if tokens is None else min(tokens, self.num_tokens)
        self._usable = self.manifest.shards[: -(-wanted // self.manifest.shard_tokens)]
        if isinstance(self.source, LocalSource) and verify != "off":
            check_shards(self.source.folder, self._usable, full=verify == "full")
        elif self.source.remote and verify in ("full", "size"):
            fetch_shards(self.source, self._usable)
        members = sum(len(shard.member_xxh3) for shard in self.manifest.shards)
        self._lazy = verify == "lazy"
        self._unchecked = np.full(members, self._lazy)

    def tokens(self, start: int, stop: int) -> NDArray[Any]:
        """Copy the pool's tokens [start, stop), in the stored dtype."""
        assert 0 <= start <= stop <= self.num_tokens
        out = np.empty(stop - start, self._dtype)
        size, filled = self.manifest.member_tokens, 0
        while filled < len(out):
            member, offset = divmod(start + filled, size)
            count = min(size - offset, len(out) - filled)
            out[filled : filled + count] = self._member(member, offset, count)
            filled += count
        return out

    def locate(self, ids: NDArray[np.int64], seq_length: int) -> Located:
        """Compute the addresses of sequences `ids`, int64 [k]; cheap in large blocks."""
        size = self.manifest.member_tokens
        start = ids * seq_length
        members, inner = np.divmod(start, size)
        shards, members = np.divmod(members, self.manifest.members_per_shard)
        offsets = (members * self._stride + HEADER_BYTES) // self._item + inner
        crosses = (inner + seq_length > size) | (start + seq_length > self.num_tokens)
        offsets[crosses] = -1
        plain = not (self._lazy or crosses.any())
        return Located(seq_length, start.tolist(), shards.tolist(), offsets.tolist(), plain)

    def rows(self, located: Located, first: int, stop: int) -> NDArray[Any]:
        """Read located sequences [first, stop) as rows of the stored dtype; pad beyond the pool."""
        length, maps = located.seq_length, self._maps
        offsets = located.offset[first:stop]
        if located.plain or (not self._lazy and min(offsets) >= 0):
            shards = located.shard
            parts = [maps[shards[i]][o : o + length] for i, o in enumerate(offsets, first)]
            return np.concatenate(parts).reshape(stop - first, length)
        out = np.full((stop - first, length), self.manifest.tokenizer.pad_id, self._dtype)
        for row, start in zip(out, located.start[first:stop], strict=True):
            end = max(start, min(start + length, self.num_tokens))
            row[: end - start] = self.tokens(min(start, end), end)
        return out

    def close(self) -> None:
        """Drop the mappings; the operating system unmaps each with its last view."""
        for shard in list(self._maps):
            self._unmap(shard)
        self._maps.clear()

    def _member(self, member: int, offset: int, count: int) -> NDArray[Any]:
        """View of `count` tokens of a member from `offset`, checked if need be."""
        if self._unchecked[member]:
            self._check_member(member)
        return self._payload(member)[offset : offset + count]

    def _payload(self, member: int) -> NDArray[Any]:
        """View of all tokens of a member."""
        shard, inner = divmod(member, self.manifest.members_per_shard)
        held = self.manifest.shards[shard].tokens - inner * self.manifest.member_tokens
        count = min(self.manifest.member_tokens, held)
        begin = (inner * self._stride + HEADER_BYTES) // self._item
        return self._maps[shard][begin : begin + count]

    def _check_member(self, member: int) -> None:
        """Compare the hash of a member that is read for the first time (`lazy`)."""
        shard, inner = divmod(member, self.manifest.members_per_shard)
        record = self.manifest.shards[shard]
        found = xxhash.xxh3_64_hexdigest(self._payload(member).data)
        if found != record.member_xxh3[inner] and self.source.repair(record):
            self._maps.close(shard)
            found = xxhash.xxh3_64_hexdigest(self._payload(member).data)
        if found != record.member_xxh3[inner]:
            raise ShardError(
                f"{self.source.label}/{record.name}: member {member:09d}.tok.bin is damaged "
                f"(xxh3 {found}, manifest says {record.member_xxh3[inner]}); restore the file"
            )
        self._unchecked[member] = False

    def _map(self, shard: int) -> NDArray[Any]:
        """Memory-map a shard as an array of tokens, headers included."""
        assert shard < len(self._usable), "read beyond the tokens this pool was opened for"
        record = self.manifest.shards[shard]
        path = self.source.open_shard(record)
        try:
            with open_regular(path) as file:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise ShardError(f"cannot map shard {path}: {error}") from error
        if len(mapped) < record.bytes:
            raise ShardError(f"shard {path} is truncated: {len(mapped):,} bytes")
        return np.frombuffer(mapped, self._dtype, len(mapped) // self._item)

    def _unmap(self, shard: int) -> None:
        """Let the source release a shard."""
        self.source.release_shard(self.manifest.shards[shard])


class _MappedShards(dict[int, NDArray[Any]]):
    """Open shards by number, opened at their first use; beyond `limit` the oldest is closed."""

    def __init__(
        self,
        opener: Callable[[int], NDArray[Any]],
        closer: Callable[[int], None],
        limit: int | None,
    ) -> None:
        super().__init__()
        self._opener, self._closer, self._limit = opener, closer, limit

    def __missing__(self, shard: int) -> NDArray[Any]:
        while self._limit is not None and len(self) >= self._limit:
            self.close(next(iter(self)))
        self[shard] = self._opener(shard)
        return self[shard]

    def close(self, shard: int) -> None:
        """Drop one mapping and let its file go."""
        del self[shard]
        self._closer(shard)


def fetch_shards(source: PoolSource, shards: tuple[ShardRecord, ...]) -> None:
    """Bring every shard into the cache; ShardError names all that are unavailable."""
    problems = []
    for shard in shards:
        try:
            source.open_shard(shard)
            source.release_shard(shard)
        except ShardError as error:
            problems.append(str(error))
    if problems:
        listed = "\n  ".join(problems)
        raise ShardError(
            f"{len(problems)} of {len(shards)} shards of {source.label} are unavailable:\n"
            f"  {listed}\nnothing was read"
        )


def check_shards(folder: Path, shards: tuple[ShardRecord, ...], *, full: bool) -> None:
    """Raise ShardError with all shards that are missing, of wrong size or (`full`) content."""
    problems = [p for p in (shard_problem(folder, s, full=full) for s in shards) if p]
    if problems:
        listed = "\n  ".join(problems)
        raise ShardError(
            f"{len(problems)} of {len(shards)} shards in {folder} are unusable:\n  {listed}\n"
            "restore these files or prepare the data again; nothing was read"
        )


def shard_problem(folder: Path, shard: ShardRecord, *, full: bool) -> str | None:
    """Describe the fault of one shard file; None if there is none."""
    try:
        path = inside(folder, shard.name)
        size = path.stat().st_size
        if size != shard.bytes:
            return f"{shard.name}: {size:,} bytes instead of {shard.bytes:,}"
        if full and (found := file_xxh3(path)) != shard.xxh3:
            return f"{shard.name}: content differs (xxh3 {found}, manifest says {shard.xxh3})"
    except FileNotFoundError:
        return f"{shard.name}: missing"
    except OSError as error:
        return f"{shard.name}: {error.strerror or error}"
    except ShardError as error:
        return str(error)
    return None


def file_xxh3(path: Path) -> str:
    """xxh3-128 of a file, read in blocks of 4 MiB."""
    digest = xxhash.xxh3_128()
    with open(path, "rb", buffering=0) as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
