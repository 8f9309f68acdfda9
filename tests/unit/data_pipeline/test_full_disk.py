"""Disks that are full for real: what is visible is whole, and the same call ends with more room."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from functools import partial
from hashlib import sha256
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.corpus.builtin import builtin_documents
from data_pipeline.corpus.source import SourceSettings
from data_pipeline.errors import DataError, ShardError
from data_pipeline.prepare.prepare import prepare
from data_pipeline.prepare.settings import PrepareSettings, TokenizerSettings
from data_pipeline.shards.cache import Cache
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.pool import TokenPool
from data_pipeline.shards.remote import RemoteSettings
from data_pipeline.shards.shards import ShardLayout, write_shard

PoolMaker = Callable[..., tuple[Path, np.ndarray]]


class Disk:
    """A file system in memory of `kib` KiB, which can grow."""

    def __init__(self, folder: Path, kib: int) -> None:
        self.folder = folder
        folder.mkdir()
        self._mount("-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(folder))

    def grow(self, kib: int) -> None:
        self._mount("-o", f"remount,size={kib}k", str(self.folder))

    def close(self) -> None:
        subprocess.run(["umount", "--lazy", str(self.folder)], check=True)

    def _mount(self, *words: str) -> None:
        subprocess.run(["mount", *words], check=True, capture_output=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """A disk of 64 KiB."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("mounting a small file system needs root and mount")
    try:
        small = Disk(tmp_path / "disk", 64)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"this machine does not let root mount tmpfs: {error.stderr.decode().strip()}")
    yield small
    small.close()


def visible(folder: Path) -> dict[str, bytes]:
    """Finished files; what a preparation keeps for its next start and its lock do not count."""
    found = (p.relative_to(folder) for p in folder.rglob("*") if p.is_file())
    kept = [p for p in found if ".staging" not in p.parts and p.suffix != ".lock"]
    return {p.as_posix(): (folder / p).read_bytes() for p in kept if p.name != ".lock"}


def test_one_shard(disk: Disk) -> None:
    """A shard of 160 KiB on a disk of 64 KiB leaves nothing behind, not even an allocation."""
    tokens = np.arange(80_000, dtype="<u4").astype("<u2")
    layout = ShardLayout("train", np.dtype("<u2"), 4096, 100)

    def write() -> str:
        return write_shard(disk.folder, layout, 0, lambda a, b: tokens[a:b], len(tokens)).sha256

    with pytest.raises(OSError, match="No space left"):
        write()
    assert list(disk.folder.iterdir()) == []
    assert shutil.disk_usage(disk.folder).used == 0
    disk.grow(256)
    assert write() == sha256((disk.folder / "train-000000.tar").read_bytes()).hexdigest()


def test_a_preparation_continues_whenever_there_is_more_room(disk: Disk, tmp_path: Path) -> None:
    """It stops in every stage, also between shards, and ends with an undisturbed one's bytes."""
    documents = [t[:2000] for _, (_, t) in zip(range(100), builtin_documents(), strict=False)]
    source = tmp_path / "text.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))

    def settings(out: Path) -> PrepareSettings:
        return PrepareSettings(
            out=out,
            sources=(SourceSettings(path=str(source)),),
            tokenizer=TokenizerSettings(model_type="bpe", vocab_size=500, num_threads=1),
            validation_fraction=0.2,
            member_bytes=2048,
            members_per_shard=4,
            workers=1,
        )

    prepare(settings(tmp_path / "undisturbed"))
    expected = visible(tmp_path / "undisturbed")
    out, shards, size = disk.folder / "out", set(), 64
    reasons: list[str] = []
    while not (out / "report.json").exists():
        assert size < 8192
        try:
            prepare(settings(out))
        except DataError as error:
            reasons.append(str(error))
            assert not list(out.rglob("*.tmp*"))
            there = visible(out)
            assert there.items() <= expected.items()
            shards.add(sum(name.endswith(".tar") for name in there))
        size += 80
        disk.grow(size)
    assert visible(out) == expected
    assert len(shards - {0}) > 1
    for words in ("No space left", "make room", "what is finished is kept"):
        assert all(words in reason for reason in reasons)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, list[str]]]:
    """An HTTP server of tmp_path, and the names it was asked for."""
    asked: list[str] = []

    class Handler(SimpleHTTPRequestHandler):
        def log_request(self, code: object = "-", size: object = "-") -> None:
            asked.append(self.path.rsplit("/", 1)[-1])

        def log_message(self, format: str, *args: object) -> None:
            """Stay quiet: the client hangs up when its disk is full."""

    handler = partial(Handler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as http:
        threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{http.server_address[1]}", asked
        http.shutdown()


def test_a_full_cache_keeps_whole_shards_only(
    disk: Disk, make_pool: PoolMaker, server: tuple[str, list[str]]
) -> None:
    """Eight shards of 17 KiB on 64 KiB: some arrive, the next one's error says what to do."""
    manifest, tokens = make_pool(65_536, member_tokens=4096, per_shard=2)
    url, asked = server
    records = {s.name: s.sha256 for s in Manifest.load(manifest).shards}
    assert len(records) == 8
    cache = Cache(disk.folder / "cache", remote=RemoteSettings(attempts=2, backoff=0.01))
    with pytest.raises(ShardError, match=r"No space left.*make room or set a smaller cache limit"):
        TokenPool(f"{url}/pool/manifest.json", cache=cache)
    there = [p for p in cache.folder.iterdir() if p.suffix != ".lock"]
    assert 0 < len([p for p in there if p.suffix == ".tar"]) < 8
    for path in there:
        name = path.name.split("-", 1)[1]
        assert path.suffix != ".part"
        assert name not in records or sha256(path.read_bytes()).hexdigest() == records[name]
    disk.grow(512)
    pool = TokenPool(f"{url}/pool/manifest.json", cache=cache)
    assert np.array_equal(pool.tokens(0, len(tokens)), tokens)
    pool.close()
    whole = [p.name.split("-", 1)[1] for p in there if p.suffix == ".tar"]
    assert all(asked.count(name) == 1 for name in whole)
