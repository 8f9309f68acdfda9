"""Sources of a pool's files: a folder of this machine, or a URL behind a cache."""

from __future__ import annotations

import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol
from urllib.parse import quote

from data_pipeline.errors import ShardError
from data_pipeline.shards.cache import Cache, RemoteFile
from data_pipeline.shards.fields import MANIFEST_BYTES
from data_pipeline.shards.files import inside
from data_pipeline.shards.manifest import Manifest, ShardRecord, read_local
from data_pipeline.shards.remote import (
    MissingError,
    RemoteSettings,
    TooLargeError,
    TransferError,
    append_rest,
    is_remote,
)


class PoolSource(Protocol):
    """Provider of local paths for the files of a pool."""

    label: str
    """Folder or URL, for messages."""
    remote: bool

    def manifest(self) -> Manifest:
        """Read the pool's manifest."""
        ...

    def open_shard(self, record: ShardRecord) -> Path:
        """Give a local path, valid until `release_shard`."""
        ...

    def release_shard(self, record: ShardRecord) -> None:
        """Give up a shard that is not read any more."""
        ...

    def repair(self, record: ShardRecord) -> bool:
        """Fetch a damaged shard again; False where that is impossible or was done before."""
        ...

    def index(self, manifest: Manifest) -> Path:
        """Give the local path of the document index."""
        ...


class LocalSource:
    """Files of a pool in a folder."""

    remote = False

    def __init__(self, manifest_path: Path) -> None:
        self._path = manifest_path
        self.folder = manifest_path.parent
        self.label = str(self.folder)

    def manifest(self) -> Manifest:
        """Read the pool's manifest."""
        return Manifest.load(self._path)

    def open_shard(self, record: ShardRecord) -> Path:
        """Path of the file in the folder."""
        return inside(self.folder, record.name)

    def release_shard(self, record: ShardRecord) -> None:
        """Do nothing: the file stays."""

    def repair(self, record: ShardRecord) -> bool:
        """Return False: there is no other copy."""
        return False

    def index(self, manifest: Manifest) -> Path:
        """Path of the file in the folder."""
        return inside(self.folder, manifest.documents.name)


class RemoteSource:
    """Files of a pool beside the URL of its manifest, through a cache."""

    remote = True

    def __init__(self, url: str, cache: Cache, *, check: bool = False) -> None:
        """Read the pool at `url`; `check` hashes entries that the cache already holds, once."""
        self._url, self._cache = url, cache
        self.label = url.rpartition("/")[0]
        self._pins: dict[str, ExitStack] = {}
        self._check = check
        self._checked: set[str] = set()

    def manifest(self) -> Manifest:
        """Fetch the manifest each time: it is small, and its hash is checked."""
        return Manifest.parse(read_text(self._url, self._cache.remote), self._url)

    def open_shard(self, record: ShardRecord) -> Path:
        """Download a shard if needed, and pin it in the cache."""
        check = self._check and record.name not in self._checked
        path = self._open(self._file(record), check=check)
        self._checked.add(record.name)
        return path

    def repair(self, record: ShardRecord) -> bool:
        """Download a pinned shard again; False where the cached copy has the right hash."""
        return self._cache.repair(self._file(record))

    def _file(self, record: ShardRecord) -> RemoteFile:
        return RemoteFile(
            f"{self.label}/{quote(record.name)}",
            record.name,
            record.bytes,
            record.sha256,
            record.xxh3,
        )

    def release_shard(self, record: ShardRecord) -> None:
        """Unpin a shard: the cache may evict it."""
        self._pins.pop(record.name).close()

    def index(self, manifest: Manifest) -> Path:
        """Download the document index if needed, and pin it for good."""
        record = manifest.documents
        url = f"{self.label}/{quote(record.name)}"
        return self._open(RemoteFile(url, record.name, 8 * record.count, record.sha256), check=True)

    def _open(self, file: RemoteFile, *, check: bool) -> Path:
        stack = ExitStack()
        path = stack.enter_context(self._cache.pinned(file, check=check))
        self._pins[file.name] = stack
        return path


def read_text(location: str | Path, remote: RemoteSettings | None = None) -> str:
    """Read the text of a manifest (or mix) from a path or URL; ShardError if there is none."""
    if not is_remote(location):
        return read_local(Path(location))
    settings, reason = remote or RemoteSettings(), ""
    for attempt in range(settings.attempts):
        time.sleep(min(settings.backoff * 2.0**attempt, 30.0) if attempt else 0.0)
        with tempfile.TemporaryDirectory() as folder:
            part = Path(folder) / "manifest.json"
            try:
                append_rest(str(location), part, settings, MANIFEST_BYTES)
                return part.read_text(encoding="utf-8")
            except MissingError as error:
                raise ShardError(f"no manifest at {location}: {error}") from error
            except TooLargeError as error:
                raise ShardError(f"{location} is no manifest: {error}") from error
            except UnicodeDecodeError as error:
                raise ShardError(f"cannot read the manifest {location}: {error}") from error
            except TransferError as error:
                reason = str(error)
    raise ShardError(f"cannot read the manifest {location}: {reason}")


def open_source(location: str | Path, cache: Cache | None, *, check: bool = False) -> PoolSource:
    """Make the source of a manifest path or URL; ShardError for a URL without a cache.

    `check` hashes what the cache holds already; what is downloaded is always hashed.
    """
    if not is_remote(location):
        return LocalSource(Path(location))
    if cache is None:
        raise ShardError(f"{location} is remote: give a cache folder for its shards")
    return RemoteSource(str(location), cache, check=check)
