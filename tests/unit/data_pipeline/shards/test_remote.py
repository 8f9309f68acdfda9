"""Remote shards against real servers on loopback: nginx, an S3 server, and one that misbehaves."""

from __future__ import annotations

import errno
import multiprocessing
import os
import shutil
import socket
import socketserver
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.errors import ShardError
from data_pipeline.shards.cache import Cache
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.pool import TokenPool
from data_pipeline.shards.remote import RemoteSettings
from data_pipeline.stream.budget import Budget
from data_pipeline.stream.stream import TokenStream

PoolMaker = Callable[..., tuple[Path, np.ndarray]]
FAST = RemoteSettings(timeout=5, attempts=4, backoff=0.01)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(port: int) -> None:
    for _ in range(600):
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            time.sleep(0.05)
    raise TimeoutError(f"nothing listens on {port}")


@pytest.fixture
def nginx(tmp_path: Path) -> Iterator[str]:
    """nginx that serves tmp_path."""
    program = shutil.which("nginx") or "/usr/sbin/nginx"
    if not Path(program).exists():
        pytest.skip("nginx is not installed")
    port, home = free_port(), tmp_path / "nginx"
    home.mkdir()
    (home / "nginx.conf").write_text(
        f"daemon off; master_process off; pid {home}/pid; error_log {home}/error.log;\n"
        f"user {'root' if os.getuid() == 0 else 'nobody'};\n"
        "events {}\n"
        f"http {{ access_log {home}/access.log; client_body_temp_path {home}/b;\n"
        f"proxy_temp_path {home}/p; fastcgi_temp_path {home}/f; uwsgi_temp_path {home}/u;\n"
        f"scgi_temp_path {home}/s; server {{ listen 127.0.0.1:{port}; root {tmp_path}; }} }}\n"
    )
    process = subprocess.Popen([program, "-c", home / "nginx.conf", "-p", home])
    try:
        wait_for(port)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


class Misbehaving(BaseHTTPRequestHandler):
    """Serves a folder; `faults` says what goes wrong with the next requests of a file."""

    folder: Path
    faults: dict[str, list[str]]
    requests: list[tuple[str, str]]
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        name = self.path.rsplit("/", 1)[-1]
        data = (self.folder / name).read_bytes()
        wanted = self.headers.get("Range", "")
        self.requests.append((name, wanted))
        fault = self.faults[name].pop(0) if self.faults.get(name) else ""
        if fault.isdigit():
            self.send_error(int(fault))
            return
        if fault == "damage":
            data = data[:1500] + bytes([data[1500] ^ 1]) + data[1501:]
        first = int(wanted[6:-1]) if wanted and fault != "ignore range" else 0
        self.send_response(206 if first else 200)
        body = data[first:]
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if fault == "drop":
            self.wfile.write(body[: len(body) // 2])
            self.close_connection = True
            return
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Stay quiet."""


@pytest.fixture
def bad_server() -> Iterator[tuple[type[Misbehaving], str]]:
    handler = type("Handler", (Misbehaving,), {"faults": {}, "requests": []})
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield handler, f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def read_all(pool: TokenPool) -> np.ndarray:
    return pool.tokens(0, pool.num_tokens)


def test_nginx_pool_equals_the_local_one_and_is_fetched_once(
    make_pool: PoolMaker, nginx: str, tmp_path: Path
) -> None:
    _, tokens = make_pool()
    cache = Cache(tmp_path / "cache", remote=FAST)
    for _ in range(2):
        pool = TokenPool(f"{nginx}/pool/manifest.json", cache=cache)
        assert np.array_equal(read_all(pool), tokens)
        pool.close()
    served = (tmp_path / "nginx" / "access.log").read_text()
    assert served.count("train-000001.tar") == 1
    masked = TokenStream(pool, Budget(4000, 64, 5000), seed=1, epochs=2, documents="masked")
    assert masked.num_valid(0, 50) == masked.read(np.arange(50)).valid.sum()


def test_a_partial_download_goes_on_where_it_ended(
    make_pool: PoolMaker, nginx: str, tmp_path: Path
) -> None:
    manifest, tokens = make_pool()
    record = Manifest.load(manifest).shards[1]
    cache = Cache(tmp_path / "cache", remote=FAST)
    cache.folder.mkdir()
    begun = (manifest.parent / record.name).read_bytes()[:1777]
    (cache.folder / f"{record.sha256[:16]}-{record.name}.part").write_bytes(begun)
    assert np.array_equal(read_all(TokenPool(f"{nginx}/pool/manifest.json", cache=cache)), tokens)
    lines = (tmp_path / "nginx" / "access.log").read_text().splitlines()
    (line,) = [line for line in lines if record.name in line]
    assert f" 206 {record.bytes - 1777} " in line


def test_equal_names_of_different_data_do_not_meet_in_the_cache(
    make_pool: PoolMaker, nginx: str, tmp_path: Path
) -> None:
    cache = Cache(tmp_path / "cache", remote=FAST)
    for seed, name in ((0, "a"), (1, "b")):
        _, tokens = make_pool(seed=seed, name=name)
        pool = TokenPool(f"{nginx}/{name}/manifest.json", cache=cache)
        assert np.array_equal(read_all(pool), tokens)


@pytest.mark.parametrize("fault", ["drop", "503", "damage", "ignore range"])
def test_passing_faults_are_survived(
    make_pool: PoolMaker, bad_server: tuple[type[Misbehaving], str], tmp_path: Path, fault: str
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
    bad_server: tuple[type[Misbehaving], str],
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
    make_pool: PoolMaker, nginx: str, tmp_path: Path
) -> None:
    _, tokens = make_pool()
    cache = Cache(tmp_path / "cache", remote=FAST)
    pool = TokenPool(f"{nginx}/pool/manifest.json", verify="lazy", cache=cache)
    pool.tokens(0, 1000)
    os.kill(int((tmp_path / "nginx" / "pid").read_text()), 9)
    with pytest.raises(ShardError, match="gave up after 4 attempts"):
        pool.tokens(0, 5000)
    assert np.array_equal(pool.tokens(0, 1000), tokens[:1000])


def test_window_order_stays_within_the_cache_limit(
    make_pool: PoolMaker, nginx: str, tmp_path: Path
) -> None:
    manifest, _ = make_pool(12_288)
    sizes = [shard.bytes for shard in Manifest.load(manifest).shards]
    assert len(sizes) == 8
    limit = 4 * max(sizes)
    cache = Cache(tmp_path / "cache", limit_bytes=limit, remote=FAST)
    pool = TokenPool(f"{nginx}/pool/manifest.json", verify="lazy", cache=cache, open_shards=3)
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
    make_pool: PoolMaker, nginx: str, tmp_path: Path
) -> None:
    make_pool()
    cache = Cache(tmp_path / "cache", limit_bytes=1000, remote=FAST)
    with pytest.raises(ShardError, match="limited to 1,000 bytes"):
        TokenPool(f"{nginx}/pool/manifest.json", cache=cache)


def test_full_disk_while_caching_ends_clearly(
    make_pool: PoolMaker, nginx: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, tokens = make_pool()
    cache, fsync = Cache(tmp_path / "cache", remote=FAST), os.fsync

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ShardError, match=r"No space left.*make room"):
        TokenPool(f"{nginx}/pool/manifest.json", cache=cache)
    assert not list(cache.folder.glob("*.part"))
    monkeypatch.setattr(os, "fsync", fsync)
    assert np.array_equal(read_all(TokenPool(f"{nginx}/pool/manifest.json", cache=cache)), tokens)


def fetch_in_process(url: str, folder: Path, barrier: Any, results: Any) -> None:
    barrier.wait()
    pool = TokenPool(url, cache=Cache(folder, remote=FAST))
    results.put(int(read_all(pool).astype(np.int64).sum()))


def test_processes_share_one_download(make_pool: PoolMaker, nginx: str, tmp_path: Path) -> None:
    _, tokens = make_pool()
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(3), context.Queue()
    arguments = (f"{nginx}/pool/manifest.json", tmp_path / "cache", barrier, results)
    workers = [context.Process(target=fetch_in_process, args=arguments) for _ in range(3)]
    for worker in workers:
        worker.start()
    sums = [results.get(timeout=120) for _ in workers]
    for worker in workers:
        worker.join()
    assert sums == [int(tokens.astype(np.int64).sum())] * 3
    served = (tmp_path / "nginx" / "access.log").read_text()
    assert served.count("train-000000.tar") == 1


def test_remote_pool_without_a_cache_is_refused() -> None:
    with pytest.raises(ShardError, match="give a cache folder"):
        TokenPool("http://127.0.0.1:1/manifest.json")


def test_s3_with_boto3_and_with_a_command(
    make_pool: PoolMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moto = pytest.importorskip("moto.server", reason="needs moto[s3,server]")
    boto3 = pytest.importorskip("boto3")
    manifest, tokens = make_pool()
    port = free_port()
    server = moto.ThreadedMotoServer(port=port, verbose=False)
    server.start()
    try:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        client = boto3.client("s3")
        client.create_bucket(Bucket="shards")
        for file in manifest.parent.iterdir():
            client.upload_file(str(file), "shards", f"train/{file.name}")
        url = "s3://shards/train/manifest.json"
        record = Manifest.load(manifest).shards[0]
        cache = Cache(tmp_path / "cache", remote=FAST)
        cache.folder.mkdir()
        begun = (manifest.parent / record.name).read_bytes()[:999]
        (cache.folder / f"{record.sha256[:16]}-{record.name}.part").write_bytes(begun)
        assert np.array_equal(read_all(TokenPool(url, cache=cache)), tokens)
        client.delete_object(Bucket="shards", Key="train/train-000002.tar")
        with pytest.raises(ShardError, match="NoSuchKey"):
            TokenPool(url, cache=Cache(tmp_path / "other", remote=FAST))
    finally:
        server.stop()


def test_s3_command_template_resumes_and_reports(
    make_pool: PoolMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest, tokens = make_pool()
    monkeypatch.setitem(__import__("sys").modules, "boto3", None)
    script = tmp_path / "s3cat"
    script.write_text(f'#!/bin/sh\nexec cat "{manifest.parent}/${{1##*/}}"\n')
    script.chmod(0o755)
    remote = RemoteSettings(attempts=2, backoff=0.01, s3_command=f"{script} {{url}}")
    record = Manifest.load(manifest).shards[0]
    cache = Cache(tmp_path / "cache", remote=remote)
    cache.folder.mkdir()
    begun = (manifest.parent / record.name).read_bytes()[:999]
    (cache.folder / f"{record.sha256[:16]}-{record.name}.part").write_bytes(begun)
    pool = TokenPool("s3://bucket/manifest.json", cache=cache)
    assert np.array_equal(read_all(pool), tokens)
    (manifest.parent / "train-000003.tar").unlink()
    with pytest.raises(ShardError, match="No such file"):
        TokenPool("s3://bucket/manifest.json", cache=Cache(tmp_path / "other", remote=remote))
    missing = RemoteSettings(s3_command="no-such-program {url}")
    with pytest.raises(ShardError, match=r"boto3 .* or the command 'no-such-program'"):
        TokenPool("s3://bucket/manifest.json", cache=Cache(tmp_path / "third", remote=missing))
