"""A cache of remote files, named by content: shared by runs, safe for processes, bounded.

Entries are called `<first 16 digits of sha256>-<name>`, so equal names of different data do not
collide. One process of a machine downloads an entry, under its lock; the others wait and find it. A
file is published only after its size and hash were checked. Open entries are pinned by a shared
lock, which eviction respects across processes.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import IO, Any

import xxhash

from data_pipeline.errors import ShardError
from data_pipeline.regular import open_regular
from data_pipeline.shards.files import inside, publish
from data_pipeline.shards.remote import (
    MissingError,
    RemoteSettings,
    TooLargeError,
    TransferError,
    append_rest,
)

log = logging.getLogger(__name__)

_BAD_CONTENT_ATTEMPTS = 3


@dataclass(frozen=True)
class RemoteFile:
    """A remote file with the size and the hashes that it must have."""

    url: str
    name: str
    bytes: int
    sha256: str
    xxh3: str | None = None
    """xxh3-128, which finds damage five times faster. Downloads are checked by both: a manifest may
    state the sha256 of another pool's shard, whose place in the cache it must not take."""


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
    def pinned(self, file: RemoteFile, *, check: bool = False) -> Iterator[Path]:
        """Download an entry if needed and keep it while the context is open.

        `check` hashes an entry that is there already, and replaces a damaged one. Yields the local
        path; ShardError if it is unavailable or damaged.
        """
        path = self.path(file)
        with self._entry_lock(path) as lock:
            while True:
                fcntl.flock(lock, fcntl.LOCK_SH)
                if _has_size(path, file):
                    if check:
                        self.repair(file)
                    break
                fcntl.flock(lock, fcntl.LOCK_EX)
                self._download(file, path)
                check = False
            with suppress(OSError):  # a folder that may only be read
                os.utime(path)
            yield path

    def repair(self, file: RemoteFile) -> bool:
        """Delete a damaged entry and download it once more; False where its hash is right.

        The caller has it pinned. Others may have it mapped, so this waits for nobody: they keep the
        old file until they let it go. ShardError if it is unavailable.
        """
        path = self.path(file)
        if _has_size(path, file) and _difference(path, file) is None:  # without a lock: a folder
            return False  # that may only be read has none
        with self._entry_lock(path.with_name(path.name + ".repair")) as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if _has_size(path, file) and (found := _difference(path, file)) is None:
                return False
            log.warning(
                "%s in the cache is damaged (%s); it is deleted and downloaded again", path, found
            )
            path.unlink(missing_ok=True)
            self._download(file, path)
        return True

    @contextmanager
    def _entry_lock(self, path: Path) -> Iterator[IO[bytes]]:
        """Open lock file of an entry; in a folder that may only be read, the entry itself."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = open(path.with_name(path.name + ".lock"), "ab")  # noqa: SIM115
        except OSError as error:
            if path.is_file() and error.errno in (errno.EROFS, errno.EACCES):
                with open(path, "rb") as entry:  # a folder that only others fill
                    yield entry
                return
            raise ShardError(f"cannot use the cache {self.folder}: {error.strerror}") from error
        with lock:
            yield lock

    def _download(self, file: RemoteFile, path: Path) -> None:
        """Fetch, check and publish; the caller holds the entry's exclusive lock."""
        if _has_size(path, file):
            return
        part = path.with_name(path.name + ".part")
        for _ in range(_BAD_CONTENT_ATTEMPTS):
            try:
                self._make_room(file.bytes, path)
                if shutil.disk_usage(self.folder).free < file.bytes - _size(part):
                    raise OSError(
                        errno.ENOSPC, f"{os.strerror(errno.ENOSPC)} for {file.bytes:,} bytes"
                    )
                self._transfer(file, part)
                found = _difference(part, file, thorough=True)
                if found is None:
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
            f"downloads ({found}); the copy on the server is damaged"
        )

    def _transfer(self, file: RemoteFile, part: Path) -> None:
        """Append to `part` until its size is right, with pauses that double."""
        pause, reason = self.remote.backoff, ""
        for attempt in range(self.remote.attempts):
            if attempt:
                time.sleep(min(pause, 30.0))
                pause *= 2
            try:
                append_rest(file.url, part, self.remote, file.bytes)
                size = part.stat().st_size
                if size == file.bytes:
                    return
                reason = f"{size:,} bytes instead of {file.bytes:,}"
            except MissingError as error:
                part.unlink(missing_ok=True)
                raise ShardError(f"{file.url}: {error}") from error
            except TooLargeError as error:
                reason = str(error)
                part.unlink()
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


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _has_size(path: Path, file: RemoteFile) -> bool:
    return path.is_file() and path.stat().st_size == file.bytes


def _difference(path: Path, file: RemoteFile, *, thorough: bool = False) -> str | None:
    """Describe how a file's hash differs from the one it must have; `thorough` compares both."""
    wanted = {"xxh3": file.xxh3} if file.xxh3 else {}
    if thorough or not wanted:
        wanted |= {"sha256": file.sha256}
    digests: dict[str, Any] = {"xxh3": xxhash.xxh3_128(), "sha256": sha256()}
    with open_regular(path) as opened:
        while block := opened.read(1 << 22):
            for name in wanted:
                digests[name].update(block)
    for name, value in wanted.items():
        if (found := digests[name].hexdigest()) != value:
            return f"{name} {found}, expected {value}"
    return None
