"""Shards on S3, read by boto3 or by a command."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from servers import free_port

from data_pipeline.errors import ShardError
from data_pipeline.shards.cache import Cache
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.pool import TokenPool
from data_pipeline.shards.remote import RemoteSettings

PoolMaker = Callable[..., tuple[Path, np.ndarray]]
FAST = RemoteSettings(timeout=5, attempts=4, backoff=0.01)


def read_all(pool: TokenPool) -> np.ndarray:
    return pool.tokens(0, pool.num_tokens)


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
    monkeypatch.setitem(sys.modules, "boto3", None)
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
