"""Faults of a server: passing ones are survived, lasting ones end clearly."""

from __future__ import annotations

import shutil
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


STRICT = RemoteSettings(timeout=5, attempts=2, backoff=0.01, min_speed=2000, speed_window=0.3)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("endless", "more than the 5,632 bytes that it may have"),
        ("byte by byte", "slower than 2,000 bytes a second"),
        ("slow headers", "slower than 2,000 bytes a second"),
        ("to file:///etc/passwd", "Redirection to url 'file:///etc/passwd' is not allowed"),
        ("to ftp://127.0.0.1/x", "a redirect from http to ftp is not followed"),
    ],
)
def test_a_server_is_bounded_in_size_time_and_redirects(
    make_pool: PoolMaker,
    bad_server: tuple[type[FileHandler], str],
    tmp_path: Path,
    fault: str,
    reason: str,
) -> None:
    manifest, _ = make_pool()
    handler, url = bad_server
    handler.folder, handler.sent = manifest.parent, {}
    handler.faults = {"train-000001.tar": [fault] * 9}
    cache = Cache(tmp_path / "cache", remote=STRICT)
    with pytest.raises(ShardError, match=reason):
        TokenPool(f"{url}/manifest.json", cache=cache)
    assert not list(cache.folder.glob("*000001.tar.part"))
    # What a socket holds is sent before the client has gone: megabytes, not what comes for ever.
    assert handler.sent.get("endless", 0) * (1 << 16) < 50e6


def test_an_endless_manifest_is_refused(
    make_pool: PoolMaker,
    bad_server: tuple[type[FileHandler], str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    manifest, tokens = make_pool()
    handler, url = bad_server
    handler.folder, handler.faults = manifest.parent, {"manifest.json": ["endless"]}
    monkeypatch.setattr("data_pipeline.shards.source.MANIFEST_BYTES", 1 << 20)
    with pytest.raises(ShardError, match=r"no manifest: more than the 1,048,576 bytes"):
        TokenPool(f"{url}/manifest.json", cache=Cache(tmp_path / "cache", remote=FAST))
    handler.faults = {"manifest.json": [f"to {url}/manifest.json"]}
    pool = TokenPool(f"{url}/manifest.json", cache=Cache(tmp_path / "cache", remote=FAST))
    assert np.array_equal(read_all(pool), tokens)


def test_a_file_larger_than_the_disk_is_not_begun(
    make_pool: PoolMaker, web: WebServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_pool()
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
    with pytest.raises(ShardError, match=r"No space left on device for 5,632 bytes; make room"):
        TokenPool(f"{web.url}/pool/manifest.json", cache=Cache(tmp_path / "cache", remote=FAST))
    assert web.answers("train-000000.tar") == []


def test_credentials_come_from_netrc_and_not_from_the_url(
    make_pool: PoolMaker,
    bad_server: tuple[type[FileHandler], str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    manifest, _ = make_pool()
    handler, url = bad_server
    asked: list[str | None] = []

    def get(self: FileHandler) -> None:
        asked.append(self.headers.get("Authorization"))
        FileHandler.do_GET(self)

    handler.folder, handler.do_GET = manifest.parent, get
    cache = Cache(tmp_path / "cache", remote=FAST)
    with pytest.raises(ShardError) as caught:
        TokenPool(f"{url}/manifest.json".replace("//", "//me:secret@"), cache=cache)
    assert "secret" not in str(caught.value)
    assert "~/.netrc" in str(caught.value)
    assert asked == []
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    TokenPool(f"{url}/manifest.json", cache=cache)
    assert set(asked) == {"Basic bWU6c2VjcmV0"}


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
