"""Faults of a server: passing ones are survived, lasting ones end clearly."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from servers import FileHandler, WebServer

from data_pipeline.errors import ShardError
from data_pipeline.shards.cache import Cache
from data_pipeline.shards.pool import TokenPool
from data_pipeline.shards.remote import RemoteSettings

PoolMaker = Callable[..., tuple[Path, np.ndarray]]
FAST = RemoteSettings(timeout=5, attempts=4, backoff=0.01)


def read_all(pool: TokenPool) -> np.ndarray:
    return pool.tokens(0, pool.num_tokens)


@pytest.mark.parametrize("fault", ["drop", "503", "damage", "ignore range"])
def test_passing_faults_are_survived(
    make_pool: PoolMaker, bad_server: tuple[type[FileHandler], str], tmp_path: Path, fault: str
) -> None:
    manifest, tokens = make_pool()
    handler, url = bad_server
    handler.folder = manifest.parent
    first = "drop" if fault == "ignore range" else fault
    handler.faults = {"train-000001.tar": [first, fault], "train-000002.tar": [first]}
    pool = TokenPool(f"{url}/manifest.json", cache=Cache(tmp_path / "cache", remote=FAST))
    assert np.array_equal(read_all(pool), tokens)
    if fault == "drop":  # halves add up: each request asks for the rest only
        asked = [r for name, r in handler.requests if name == "train-000001.tar"]
        assert asked[0] == ""
        assert asked[1].startswith("bytes=")
        assert asked[2] > asked[1] or len(asked[2]) > len(asked[1])


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("404", "HTTP 404"),
        ("500", "gave up after 4 attempts"),
        ("damage", "content differs from the manifest in 3 downloads"),
    ],
)
def test_lasting_faults_end_clearly_naming_all_shards(
    make_pool: PoolMaker,
    bad_server: tuple[type[FileHandler], str],
    tmp_path: Path,
    fault: str,
    reason: str,
) -> None:
    manifest, _ = make_pool()
    handler, url = bad_server
    handler.folder = manifest.parent
    names = ("train-000001.tar", "train-000003.tar")
    handler.faults = {name: [fault] * 50 for name in names}
    with pytest.raises(ShardError, match=reason) as caught:
        TokenPool(f"{url}/manifest.json", cache=Cache(tmp_path / "cache", remote=FAST))
    assert "2 of 4 shards" in str(caught.value)
    assert all(name in str(caught.value) for name in names)
    assert caught.value.exit_code == 3
    assert not list((tmp_path / "cache").glob("*000001.tar"))


def test_server_killed_in_the_middle_ends_clearly_and_resumes_later(
    make_pool: PoolMaker, web: WebServer, tmp_path: Path
) -> None:
    _, tokens = make_pool()
    cache = Cache(tmp_path / "cache", remote=FAST)
    pool = TokenPool(f"{web.url}/pool/manifest.json", verify="lazy", cache=cache)
    pool.tokens(0, 1000)
    web.kill()
    with pytest.raises(ShardError, match="gave up after 4 attempts"):
        pool.tokens(0, 5000)
    assert np.array_equal(pool.tokens(0, 1000), tokens[:1000])


def test_remote_pool_without_a_cache_is_refused() -> None:
    with pytest.raises(ShardError, match="give a cache folder"):
        TokenPool("http://127.0.0.1:1/manifest.json")
