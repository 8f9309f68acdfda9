"""A cache on a disk that this user may only read."""

from __future__ import annotations

import os
import tempfile
from hashlib import sha256
from pathlib import Path

import pytest

from data_pipeline.errors import ShardError
from data_pipeline.shards.cache import Cache, RemoteFile


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become somebody else")
def test_a_cache_that_may_only_be_read_serves_what_it_holds() -> None:
    """Filled by one user, read by another; what it lacks is an error that names the folder."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        held = RemoteFile("http://127.0.0.1:9/a", "a", 5, sha256(b"hello").hexdigest())
        lacking = RemoteFile("http://127.0.0.1:9/b", "b", 5, sha256(b"world").hexdigest())
        cache = Cache(folder)
        cache.path(held).write_bytes(b"hello")
        cache.path(held).chmod(0o644)
        folder.chmod(0o755)
        os.seteuid(65534)
        try:
            for check in (False, True):
                with cache.pinned(held, check=check) as path:
                    assert path.read_bytes() == b"hello"
            with pytest.raises(ShardError, match=f"cannot use the cache {folder}"):
                cache.pinned(lacking).__enter__()
        finally:
            os.seteuid(0)
