"""The cache: each file is fetched once, kept whole, shared by processes, within its limit."""

from __future__ import annotations

import errno
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from servers import WebServer

from data_pipeline.errors import ShardError
from data_pipeline.shards.cache import Cache, RemoteFile
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.pool import TokenPool
from data_pipeline.shards.remote import RemoteSettings
from data_pipeline.stream.budget import Budget
from data_pipeline.stream.stream import TokenStream

PoolMaker = Callable[..., tuple[Path, np.ndarray]]
FAST = RemoteSettings(timeout=5, attempts=4, backoff=0.01)


def read_all(pool: TokenPool) -> np.ndarray:
    return pool.tokens(0, pool.num_tokens)


def test_a_remote_pool_equals_the_local_one_and_is_fetched_once(
    make_pool: PoolMaker, web: WebServer, tmp_path: Path
) -> None:
    _, tokens = make_pool()
    cache = Cache(tmp_path / "cache", remote=FAST)
    for _ in range(2):
        pool = TokenPool(f"{web.url}/pool/manifest.json", cache=cache)
        assert np.array_equal(read_all(pool), tokens)
        pool.close()
    assert len(web.answers("train-000001.tar")) == 1
    masked = TokenStream(pool, Budget(4000, 64, 5000), seed=1, epochs=2, documents="masked")
    assert masked.num_valid(0, 50) == masked.read(np.arange(50)).valid.sum()


def test_a_partial_download_continues_at_its_end(
    make_pool: PoolMaker, web: WebServer, tmp_path: Path
) -> None:
    manifest, tokens = make_pool()
    record = Manifest.load(manifest).shards[1]
    cache = Cache(tmp_path / "cache", remote=FAST)
    cache.folder.mkdir()
    begun = (manifest.parent / record.name).read_bytes()[:1777]
    (cache.folder / f"{record.sha256[:16]}-{record.name}.part").write_bytes(begun)
    assert np.array_equal(read_all(TokenPool(f"{web.url}/pool/manifest.json", cache=cache)), tokens)
    assert web.answers(record.name) == [(206, record.bytes - 1777)]


def test_equal_names_of_different_data_do_not_collide(
    make_pool: PoolMaker, web: WebServer, tmp_path: Path
) -> None:
    cache = Cache(tmp_path / "cache", remote=FAST)
    for seed, name in ((0, "a"), (1, "b")):
        _, tokens = make_pool(seed=seed, name=name)
        pool = TokenPool(f"{web.url}/{name}/manifest.json", cache=cache)
        assert np.array_equal(read_all(pool), tokens)


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[700] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("verify", ["full", "lazy"])
def test_a_damaged_entry_is_downloaded_again_once(
    make_pool: PoolMaker,
    web: WebServer,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    verify: Any,
) -> None:
    _, tokens = make_pool()
    cache, url = Cache(tmp_path / "cache", remote=FAST), f"{web.url}/pool/manifest.json"
    reader = TokenPool(url, verify="lazy", cache=cache)  # another run, which has the entry mapped
    assert np.array_equal(read_all(reader), tokens)
    [entry] = cache.folder.glob("*-train-000001.tar")
    damaged = entry.with_name("damaged")
    damaged.write_bytes(entry.read_bytes())
    flip_a_byte(damaged)
    damaged.rename(entry)
    for _ in range(2):
        pool = TokenPool(url, verify=verify, cache=cache)
        assert np.array_equal(read_all(pool), tokens)
    assert len(web.answers("train-000001.tar")) == 2
    assert caplog.text.count("train-000001.tar in the cache is damaged") == 1
    assert np.array_equal(read_all(reader), tokens)


def test_a_damaged_entry_whose_server_is_gone_is_refused(
    make_pool: PoolMaker, web: WebServer, tmp_path: Path
) -> None:
    manifest, _ = make_pool()
    cache, url = Cache(tmp_path / "cache", remote=FAST), f"{web.url}/pool/manifest.json"
    TokenPool(url, cache=cache).close()
    for name in ("train-000001.tar", "documents.bin"):
        (manifest.parent / name).unlink()
        for entry in cache.folder.glob(f"*-{name}"):
            flip_a_byte(entry)
    with pytest.raises(ShardError, match=r"train-000001\.tar: HTTP 404"):
        TokenPool(url, cache=cache)
    assert not list(cache.folder.glob("*-train-000001.tar"))


def test_a_manifest_cannot_put_its_content_in_the_place_of_another(
    make_pool: PoolMaker, web: WebServer, tmp_path: Path
) -> None:
    """The cache names entries by sha256, so a download must have it, whatever its xxh3."""
    manifest, _ = make_pool()
    record = Manifest.load(manifest).shards[0]
    poisoned = RemoteFile(
        f"{web.url}/pool/{record.name}", record.name, record.bytes, "0" * 64, record.xxh3
    )
    cache = Cache(tmp_path / "cache", remote=FAST)
    with pytest.raises(ShardError, match="sha256"), cache.pinned(poisoned):
        pass


def test_window_order_stays_within_the_cache_limit(
    make_pool: PoolMaker, web: WebServer, tmp_path: Path
) -> None:
    manifest, _ = make_pool(12_288)
    sizes = [shard.bytes for shard in Manifest.load(manifest).shards]
    assert len(sizes) == 8
    limit = 4 * max(sizes)
    cache = Cache(tmp_path / "cache", limit_bytes=limit, remote=FAST)
    pool = TokenPool(f"{web.url}/pool/manifest.json", verify="lazy", cache=cache, open_shards=3)
    local = TokenPool(manifest)
    options: dict[str, Any] = {"seed": 2, "epochs": 2, "order": "window(2)"}
    remote_stream = TokenStream(pool, Budget(None, 64, 12_288), **options)
    local_stream = TokenStream(local, Budget(None, 64, 12_288), **options)
    for start in range(0, remote_stream.total_positions, 16):
        positions = np.arange(start, start + 16)
        assert np.array_equal(
            remote_stream.read(positions).tokens, local_stream.read(positions).tokens
        )
        held = sum(p.stat().st_size for p in cache.folder.glob("*.tar"))
        assert held <= limit


def test_a_cache_that_is_too_small_says_so(
    make_pool: PoolMaker, web: WebServer, tmp_path: Path
) -> None:
    make_pool()
    cache = Cache(tmp_path / "cache", limit_bytes=1000, remote=FAST)
    with pytest.raises(ShardError, match="limited to 1,000 bytes"):
        TokenPool(f"{web.url}/pool/manifest.json", cache=cache)


def test_full_disk_while_caching_ends_clearly(
    make_pool: PoolMaker, web: WebServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, tokens = make_pool()
    cache, fsync = Cache(tmp_path / "cache", remote=FAST), os.fsync

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ShardError, match=r"No space left.*make room"):
        TokenPool(f"{web.url}/pool/manifest.json", cache=cache)
    assert not list(cache.folder.glob("*.part"))
    monkeypatch.setattr(os, "fsync", fsync)
    assert np.array_equal(read_all(TokenPool(f"{web.url}/pool/manifest.json", cache=cache)), tokens)


def fetch_in_process(url: str, folder: Path, barrier: Any, results: Any) -> None:
    barrier.wait()
    pool = TokenPool(url, cache=Cache(folder, remote=FAST))
    results.put(int(read_all(pool).astype(np.int64).sum()))


def test_processes_share_one_download(make_pool: PoolMaker, web: WebServer, tmp_path: Path) -> None:
    _, tokens = make_pool()
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(3), context.Queue()
    arguments = (f"{web.url}/pool/manifest.json", tmp_path / "cache", barrier, results)
    workers = [context.Process(target=fetch_in_process, args=arguments) for _ in range(3)]
    for worker in workers:
        worker.start()
    sums = [results.get(timeout=120) for _ in workers]
    for worker in workers:
        worker.join()
    assert sums == [int(tokens.astype(np.int64).sum())] * 3
    assert len(web.answers("train-000000.tar")) == 1
