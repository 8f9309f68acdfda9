"""A cache of remote files, named by content: shared by runs, safe for processes, bounded.

Entries are called `<first 16 digits of sha256>-<name>`, so equal names of different data do not
collide. One process of a machine downloads an entry, under its lock; the others wait and find it. A
file is published only after its size and hash were checked. Open entries are pinned by a shared
lock, which eviction respects across processes.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import IO

import xxhash

from data_pipeline.errors import ShardError
from data_pipeline.shards.files import inside, publish
from data_pipeline.shards.remote import MissingError, RemoteSettings, TransferError, append_rest

_BAD_CONTENT_ATTEMPTS = 3


@dataclass(frozen=True)
class RemoteFile:
    """A remote file with the size and the hashes that it must have."""

    url: str
    name: str
    bytes: int
    sha256: str
    xxh3: str | None = None
    """xxh3-128, checked instead of sha256 where known (it is five times faster)."""


class Cache:
    """Remote files on a local disk, at most `limit_bytes` of them."""

    def __init__(
        self,
        folder: Path,
        limit_bytes: int | None = None,
        remote: RemoteSettings | None = None,
    ) -> None:
        """Use `folder`, which is made when it is first needed; a limit of None is none."""
        self.folder, self.limit_bytes = Path(folder), limit_bytes
        self.remote = remote or RemoteSettings()

    def path(self, file: RemoteFile) -> Path:
        """Local path of an entry, whether it is there or not; ShardError for a hostile name."""
        return inside(self.folder, f"{file.sha256[:16]}-{file.name}")

    @contextmanager
    def pinned(self, file: RemoteFile) -> Iterator[Path]:
        """Download an entry if needed and keep it while the context is open.

        Yields its local path; ShardError if it is unavailable or damaged.
        """
        path = self.path(file)
        with self._entry_lock(path) as lock:
            while True:
                fcntl.flock(lock, fcntl.LOCK_SH)
                if path.exists() and path.stat().st_size == file.bytes:
                    break
                fcntl.flock(lock, fcntl.LOCK_EX)
                self._download(file, path)
            os.utime(path)
            yield path

    @contextmanager
    def _entry_lock(self, path: Path) -> Iterator[IO[bytes]]:
        """Open lock file of an entry."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = open(path.with_name(path.name + ".lock"), "ab")  # noqa: SIM115
        except OSError as error:
            raise ShardError(f"cannot use the cache {self.folder}: {error.strerror}") from error
        with lock:
            yield lock

    def _download(self, file: RemoteFile, path: Path) -> None:
        """Fetch, check and publish; the caller holds the entry's exclusive lock."""
        if path.exists() and path.stat().st_size == file.bytes:
            return
        part = path.with_name(path.name + ".part")
        for _ in range(_BAD_CONTENT_ATTEMPTS):
            try:
                self._make_room(file.bytes, path)
                self._transfer(file, part)
                found = _content_hash(part, file)
                if found == (file.xxh3 or file.sha256):
                    descriptor = os.open(part, os.O_RDONLY)
                    os.fsync(descriptor)
                    os.close(descriptor)
                    publish(part, path)
                    return
            except OSError as error:
                part.unlink(missing_ok=True)
                hint = (
                    "make room or set a smaller cache limit"
                    if error.errno == errno.ENOSPC
                    else "fix the folder"
                )
                raise ShardError(
                    f"cannot cache {file.url} in {self.folder}: {error.strerror}; {hint}"
                ) from error
            part.unlink()
        raise ShardError(
            f"{file.url}: content differs from the manifest in {_BAD_CONTENT_ATTEMPTS} "
            f"downloads (hash {found}, expected {file.xxh3 or file.sha256}); "
            "the copy on the server is damaged"
        )

    def _transfer(self, file: RemoteFile, part: Path) -> None:
        """Append to `part` until its size is right, with pauses that double."""
        pause, reason = self.remote.backoff, ""
        for attempt in range(self.remote.attempts):
            if attempt:
                time.sleep(min(pause, 30.0))
                pause *= 2
            try:
                append_rest(file.url, part, self.remote)
                size = part.stat().st_size
                if size == file.bytes:
                    return
                reason = f"{size:,} bytes instead of {file.bytes:,}"
                if size > file.bytes:
                    part.unlink()
            except MissingError as error:
                raise ShardError(f"{file.url}: {error}; the file is not there") from error
            except TransferError as error:
                reason = str(error)
        part.unlink(missing_ok=True)
        raise ShardError(
            f"{file.url}: gave up after {self.remote.attempts} attempts; last: {reason}"
        )

    def _make_room(self, needed: int, keep: Path) -> None:
        """Evict entries that no process has open, least recently used first."""
        if self.limit_bytes is None:
            return
        entries = [p for p in self.folder.iterdir() if p.suffix not in (".lock", ".part")]
        entries.sort(key=lambda p: p.stat().st_mtime_ns)
        used = sum(p.stat().st_size for p in entries)
        for entry in entries:
            if used + needed <= self.limit_bytes:
                return
            if entry != keep:
                used -= _evict(entry)
        if used + needed > self.limit_bytes:
            raise ShardError(
                f"the cache {self.folder} is limited to {self.limit_bytes:,} bytes, {used:,} of "
                f"them are in use, and {needed:,} more are needed; raise the limit"
            )


def _evict(entry: Path) -> int:
    """Delete an entry unless a process has it pinned; return the bytes that became free."""
    with open(entry.with_name(entry.name + ".lock"), "ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return 0
        size = entry.stat().st_size
        entry.unlink()
        return size


def _content_hash(path: Path, expected: RemoteFile) -> str:
    """Hash of a downloaded file, of the kind that `expected` is checked by."""
    digest = xxhash.xxh3_128() if expected.xxh3 else sha256()
    with open(path, "rb", buffering=0) as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
