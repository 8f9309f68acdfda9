"""Shards are plain tar; any slice of the pool is what was written; damage is refused."""

from __future__ import annotations

import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.errors import ShardError
from data_pipeline.progress import Silent
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.pool import TokenPool
from data_pipeline.shards.shards import HEADER_BYTES
from data_pipeline.shards.verify import pool_problems

PoolMaker = Callable[..., tuple[Path, np.ndarray]]


def rows(pool: TokenPool, ids: np.ndarray, length: int) -> np.ndarray:
    return pool.rows(pool.locate(ids, length), 0, len(ids))


def test_tokens_and_rows_agree_with_what_was_written(make_pool: PoolMaker) -> None:
    manifest, tokens = make_pool(5000)
    pool = TokenPool(manifest)
    rng = np.random.default_rng(2)
    for start, stop in np.sort(rng.integers(0, 5001, (200, 2)), axis=1):
        assert np.array_equal(pool.tokens(int(start), int(stop)), tokens[start:stop])
    for length in (1, 7, 64, 100, 512, 513, 2000, 6000):
        count = -(-5000 // length)
        padded = np.zeros(count * length, "<u2")
        padded[:5000] = tokens
        ids = rng.permutation(count)
        assert np.array_equal(rows(pool, ids, length), padded.reshape(count, length)[ids])


def test_shards_are_plain_tar_for_tar_tarfile_and_webdataset(make_pool: PoolMaker) -> None:
    manifest, tokens = make_pool(5000)
    shards = [manifest.parent / s.name for s in Manifest.load(manifest).shards]
    assert len(shards) == 4
    read = b""
    for shard in shards:
        with tarfile.open(shard) as tar:
            for member in tar:
                assert member.mtime == 0
                file = tar.extractfile(member)
                assert file is not None
                read += file.read()
    assert read == tokens.tobytes()
    listing = subprocess.run(["tar", "tf", shards[0]], capture_output=True, text=True, check=True)
    assert listing.stdout.split() == [f"{i:09d}.tok.bin" for i in range(3)]
    assert listing.stderr == ""

    import webdataset

    samples = webdataset.WebDataset([str(s) for s in shards], shardshuffle=False)
    joined = b"".join(sample["tok.bin"] for sample in samples)
    assert joined == tokens.tobytes()


def test_same_tokens_give_the_same_bytes_and_identity(make_pool: PoolMaker) -> None:
    first, _ = make_pool(name="a")
    second, _ = make_pool(name="b")
    other, _ = make_pool(name="c", seed=1)
    files = sorted(p.name for p in first.parent.iterdir())
    assert files == sorted(p.name for p in second.parent.iterdir())
    assert all((first.parent / f).read_bytes() == (second.parent / f).read_bytes() for f in files)
    assert Manifest.load(first).sha256 == Manifest.load(second).sha256
    assert Manifest.load(first).sha256 != Manifest.load(other).sha256


def damage(path: Path, kind: str) -> None:
    if kind == "missing":
        path.unlink()
        return
    data = bytearray(path.read_bytes())
    member = HEADER_BYTES + 1024
    if kind == "payload bit":
        data[member + HEADER_BYTES + 11] ^= 4
    elif kind == "header bit":
        data[member + 3] ^= 1
    elif kind == "truncated in payload":
        del data[member + HEADER_BYTES + 100 :]
    elif kind == "truncated at member":
        del data[member:]
    elif kind == "no end blocks":
        del data[-1024:]
    elif kind == "zero length":
        data.clear()
    path.write_bytes(bytes(data))


SIZE_CHANGES = [
    "missing",
    "truncated in payload",
    "truncated at member",
    "no end blocks",
    "zero length",
]
CONTENT_CHANGES = ["payload bit", "header bit"]


@pytest.mark.parametrize("kind", SIZE_CHANGES + CONTENT_CHANGES)
def test_every_damaged_shard_is_named_before_the_first_token(
    make_pool: PoolMaker, kind: str
) -> None:
    manifest, _ = make_pool()
    for index in (1, 2):
        damage(manifest.parent / f"train-{index:06d}.tar", kind)
    with pytest.raises(ShardError) as caught:
        TokenPool(manifest)
    message = str(caught.value)
    assert "2 of 4 shards" in message
    assert "train-000001.tar" in message
    assert "train-000002.tar" in message
    assert caught.value.exit_code == 3
    problems = "\n".join(pool_problems(manifest, Silent()))
    assert "train-000001.tar" in problems
    assert "train-000002.tar" in problems
    assert "train-000000.tar" not in problems


@pytest.mark.parametrize("kind", SIZE_CHANGES)
def test_size_check_refuses_truncated_shards(make_pool: PoolMaker, kind: str) -> None:
    manifest, _ = make_pool()
    damage(manifest.parent / "train-000001.tar", kind)
    with pytest.raises(ShardError, match=r"train-000001\.tar"):
        TokenPool(manifest, verify="size")


def test_lazy_check_refuses_a_damaged_member_when_it_is_read(make_pool: PoolMaker) -> None:
    manifest, tokens = make_pool()
    damage(manifest.parent / "train-000001.tar", "payload bit")
    pool = TokenPool(manifest, verify="lazy")
    good, bad = np.arange(0, 32), np.array([32])
    assert np.array_equal(rows(pool, good, 64).ravel(), tokens[:2048])
    with pytest.raises(ShardError, match=r"train-000001\.tar: member 000000004"):
        rows(pool, bad, 64)
    with pytest.raises(ShardError, match=r"member 000000004"):
        TokenPool(manifest, verify="lazy").tokens(2000, 2100)


def test_only_the_shards_of_the_budget_are_needed(make_pool: PoolMaker) -> None:
    manifest, tokens = make_pool()
    damage(manifest.parent / "train-000002.tar", "missing")
    pool = TokenPool(manifest, tokens=3000)
    assert np.array_equal(pool.tokens(0, 3000), tokens[:3000])
    with pytest.raises(ShardError, match="missing"):
        TokenPool(manifest, tokens=3073)


def test_an_edited_or_broken_manifest_is_refused(make_pool: PoolMaker) -> None:
    manifest, _ = make_pool()
    text = manifest.read_text()
    for broken in (text.replace('"tokens": 5000', '"tokens": 5001', 1), text[:200], "[]", ""):
        manifest.write_text(broken)
        with pytest.raises(ShardError, match="manifest"):
            Manifest.load(manifest)
    with pytest.raises(ShardError, match="no manifest"):
        Manifest.load(manifest.parent / "nothing.json")


def test_verify_reports_index_and_stray_files(make_pool: PoolMaker) -> None:
    manifest, _ = make_pool()
    assert pool_problems(manifest, Silent()) == []
    index = manifest.parent / "documents.bin"
    index.write_bytes(index.read_bytes()[:-8])
    (manifest.parent / "train-000009.tar").write_bytes(b"")
    problems = pool_problems(manifest, Silent())
    assert len(problems) == 2
    assert "documents.bin: content differs" in problems[1]
    assert "train-000009.tar: not in the manifest" in problems[0]
