"""Random access to the token stream of a pool: shards memory-mapped at arithmetic offsets.

Nothing is loaded and nothing is indexed: a sequence is a view of the mapped tar, and a whole block
of sequences is gathered with one numpy call a shard. Sequences whose length does not divide a
member (they cross tar headers) take a slower path through `tokens`.
"""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any, Literal

import numpy as np
import xxhash
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from data_pipeline.errors import ShardError
from data_pipeline.manifest import Manifest, ShardRecord
from data_pipeline.order import IntArray
from data_pipeline.shards import HEADER_BYTES

Verify = Literal["full", "size", "lazy", "off"]


class TokenPool:
    """The tokens of one manifest, or of its first `tokens` tokens."""

    def __init__(
        self, manifest_path: Path, verify: Verify = "full", tokens: int | None = None
    ) -> None:
        """Check the shards that hold the first `tokens` tokens (default: all) before any is read.

        `full` hashes them, `size` compares sizes, `lazy` checks sizes now and each member's hash
        when it is first read, `off` checks nothing. `ShardError` lists every bad shard.
        """
        self.manifest = Manifest.load(Path(manifest_path))
        self.folder = Path(manifest_path).parent
        self.num_tokens: int = self.manifest.tokens
        """Tokens of the whole pool."""
        self._item = self.manifest.item_dtype.itemsize
        self._stride = HEADER_BYTES + self.manifest.member_tokens * self._item
        self._maps: dict[int, NDArray[np.uint8]] = {}
        self._views: dict[tuple[int, int], NDArray[Any]] = {}
        wanted = self.num_tokens if tokens is None else min(tokens, self.num_tokens)
        self._usable = self.manifest.shards[: -(-wanted // self.manifest.shard_tokens)]
        if verify != "off":
            check_shards(self.folder, self._usable, full=verify == "full")
        members = sum(len(shard.member_xxh3) for shard in self.manifest.shards)
        self._unchecked = np.full(members, verify == "lazy")

    def tokens(self, start: int, stop: int) -> NDArray[Any]:
        """A copy of the pool's tokens [start, stop), in the stored dtype."""
        assert 0 <= start <= stop <= self.num_tokens
        out = np.empty(stop - start, self.manifest.item_dtype)
        size, filled = self.manifest.member_tokens, 0
        while filled < len(out):
            member, offset = divmod(start + filled, size)
            count = min(size - offset, len(out) - filled)
            out[filled : filled + count] = self._member(member, offset, count)
            filled += count
        return out

    def gather(self, ids: IntArray, seq_length: int) -> NDArray[Any]:
        """Sequences `ids` as rows [k, seq_length] in the stored dtype; pad beyond the pool."""
        out = np.empty((len(ids), seq_length), self.manifest.item_dtype)
        whole = ids < self.num_tokens // seq_length
        rows = np.arange(len(ids)) if whole.all() else np.flatnonzero(whole)
        if self.manifest.member_tokens % seq_length == 0:
            self._gather_aligned(ids[rows], rows, seq_length, out)
        else:
            for row in rows:
                first = int(ids[row]) * seq_length
                out[row] = self.tokens(first, first + seq_length)
        for row in np.flatnonzero(~whole):
            first = int(ids[row]) * seq_length
            end = max(first, self.num_tokens)
            out[row, : end - first] = self.tokens(min(first, end), end)
            out[row, end - first :] = self.manifest.tokenizer.pad_id
        return out

    def close(self) -> None:
        """Forget the mappings; the operating system unmaps them with their last view."""
        self._views.clear()
        self._maps.clear()

    def _gather_aligned(
        self, ids: IntArray, rows: IntArray, seq_length: int, out: NDArray[Any]
    ) -> None:
        """Copy sequences that lie inside one member each: one fancy index a shard."""
        per_member = self.manifest.member_tokens // seq_length
        members, inner = np.divmod(ids, per_member)
        if self._unchecked.any():
            self._check_members(np.unique(members))
        shards, members = np.divmod(members, self.manifest.members_per_shard)
        for shard in np.unique(shards):
            chosen = np.flatnonzero(shards == shard)
            view = self._view(int(shard), seq_length)
            out[rows[chosen]] = view[members[chosen], inner[chosen]]

    def _view(self, shard: int, seq_length: int) -> NDArray[Any]:
        """Shard as [member, sequence of the member, token]: headers hide in the outer stride.

        The last member of the pool may be shorter than the view says; `gather` never asks there.
        """
        if (shard, seq_length) not in self._views:
            data = self._map(shard)[HEADER_BYTES:].view(self.manifest.item_dtype)
            members = len(self.manifest.shards[shard].member_xxh3)
            shape = (members, self.manifest.member_tokens // seq_length, seq_length)
            strides = (self._stride, seq_length * self._item, self._item)
            self._views[shard, seq_length] = as_strided(data, shape, strides, writeable=False)
        return self._views[shard, seq_length]

    def _member(self, member: int, offset: int, count: int) -> NDArray[Any]:
        """`count` tokens of a member from `offset`, as a view."""
        if self._unchecked[member]:
            self._check_members(np.array([member]))
        return self._payload(member)[offset : offset + count]

    def _payload(self, member: int) -> NDArray[Any]:
        """All tokens of a member, as a view."""
        shard, inner = divmod(member, self.manifest.members_per_shard)
        held = self.manifest.shards[shard].tokens - inner * self.manifest.member_tokens
        count = min(self.manifest.member_tokens, held)
        begin = inner * self._stride + HEADER_BYTES
        raw = self._map(shard)[begin : begin + count * self._item]
        return raw.view(self.manifest.item_dtype)

    def _check_members(self, members: IntArray) -> None:
        """Hash members that are read for the first time (`lazy`)."""
        for member in members[self._unchecked[members]]:
            shard, inner = divmod(int(member), self.manifest.members_per_shard)
            record = self.manifest.shards[shard]
            found = xxhash.xxh3_64_hexdigest(self._payload(int(member)).data)
            if found != record.member_xxh3[inner]:
                raise ShardError(
                    f"{self.folder / record.name}: member {member:09d}.tok.bin is damaged "
                    f"(xxh3 {found}, manifest says {record.member_xxh3[inner]}); restore the file"
                )
            self._unchecked[member] = False

    def _map(self, shard: int) -> NDArray[np.uint8]:
        if shard not in self._maps:
            assert shard < len(self._usable), "read beyond the tokens this pool was opened for"
            path = self.folder / self.manifest.shards[shard].name
            try:
                with open(path, "rb") as file:
                    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except (OSError, ValueError) as error:
                raise ShardError(f"cannot map shard {path}: {error}") from error
            if len(mapped) < self.manifest.shards[shard].bytes:
                raise ShardError(f"shard {path} is truncated: {len(mapped):,} bytes")
            self._maps[shard] = np.frombuffer(mapped, np.uint8)
        return self._maps[shard]


def check_shards(folder: Path, shards: tuple[ShardRecord, ...], *, full: bool) -> None:
    """`ShardError` naming every shard that is missing, has a wrong size or (`full`) wrong bytes."""
    problems = [p for p in (shard_problem(folder, s, full=full) for s in shards) if p]
    if problems:
        listed = "\n  ".join(problems)
        raise ShardError(
            f"{len(problems)} of {len(shards)} shards in {folder} are unusable:\n  {listed}\n"
            "restore these files or prepare the data again; nothing was read"
        )


def shard_problem(folder: Path, shard: ShardRecord, *, full: bool) -> str | None:
    """What is wrong with one shard file, or None."""
    path = folder / shard.name
    try:
        size = path.stat().st_size
        if size != shard.bytes:
            return f"{shard.name}: {size:,} bytes instead of {shard.bytes:,}"
        if full and (found := file_xxh3(path)) != shard.xxh3:
            return f"{shard.name}: content differs (xxh3 {found}, manifest says {shard.xxh3})"
    except FileNotFoundError:
        return f"{shard.name}: missing"
    except OSError as error:
        return f"{shard.name}: {error.strerror or error}"
    return None


def file_xxh3(path: Path) -> str:
    """xxh3-128 of a file, read in blocks of 4 MiB."""
    digest = xxhash.xxh3_128()
    with open(path, "rb", buffering=0) as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
