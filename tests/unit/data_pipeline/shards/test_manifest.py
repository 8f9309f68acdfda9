"""Well-formed manifests with wrong content are refused with the place, in bounded memory."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from forging import RUN, forge_pool, write_pool_manifest

from data_pipeline.errors import ShardError
from data_pipeline.shards.fields import CONTAINERS, MANIFEST_BYTES
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.pool import TokenPool
from data_pipeline.stream.documents import SeparatorIndex


def put(place: str, value: Any) -> Any:
    """Change of a manifest: set the value at a dotted place."""

    def change(content: Any) -> None:
        *parents, last = place.split(".")
        for key in parents:
            content = content[int(key) if key.isdigit() else key]
        content[int(last) if last.isdigit() else last] = value

    return change


WRONG: list[tuple[str, Any, str]] = [
    ("tokens", -1, "tokens: Input should be greater"),
    ("tokens", 2**60, "tokens: Input should be less"),
    ("tokens", 38045, "shards hold 38,046 tokens"),
    ("tokens", "38046", "tokens: Input should be a valid integer"),
    ("raw_bytes", 0, "raw_bytes: 0 for"),
    ("member_tokens", 0, "member_tokens: Input should be greater"),
    ("member_tokens", 255, "does not fill tar blocks"),
    ("member_tokens", 2**40, "a member has at most"),
    ("member_tokens", 1024, "shards.0: train-000000.tar does not follow"),
    ("members_per_shard", 0, "members_per_shard: Input"),
    ("dtype", "<u4", "shards.0: train-000000.tar has 77,824 bytes, 154,112 follow"),
    ("dtype", ">u2", "dtype: Input should be"),
    ("split", "test", "split: Input should be"),
    ("tokenizer.vocab_size", 70_000, "dtype <u2 is too small"),
    ("tokenizer.vocab_size", 2**40, "tokenizer.vocab_size: Input should be less"),
    ("tokenizer.vocab_size", 5, "tokenizer: doc_id 5 is outside the 5 ids"),
    ("tokenizer.pad_id", 360, "tokenizer: pad_id 360 is outside"),
    ("tokenizer.pad_id", -1, "tokenizer.pad_id: Input should be greater"),
    ("tokenizer.mask_id", 7, "never_targets holds pad_id and mask_id"),
    ("tokenizer.doc_id", 4, "never_targets holds pad_id and mask_id"),
    ("tokenizer.never_targets", [0, 4, 999], "never_targets 999 is outside"),
    ("tokenizer.sha256", "A" * 64, "tokenizer.sha256: String should match"),
    ("shards", {}, "shards: Input should be a valid tuple"),
    ("shards.0", [], "shards.0: Input should be a valid dict"),
    ("shards.0.first", 1, "shards.0: train-000000.tar does not follow"),
    ("shards.0.tokens", 0, "shards.0.tokens: Input should be greater"),
    ("shards.0.bytes", 10**15, "has 1,000,000,000,000,000 bytes"),
    ("shards.0.sha256", "0" * 63, "shards.0.sha256: String should match"),
    ("shards.0.xxh3", "0" * 31 + "\n", "shards.0.xxh3: String should match"),
    ("shards.0.member_xxh3", ["00"], "shards.0.member_xxh3.0: String should match"),
    ("shards.0.name", "documents.bin", "do not all have different names"),
    ("documents.count", 38047, "documents: 38,047 separators"),
    ("sources.0.tokens", 1, "sources: their tokens do not add up"),
    ("sources.0", 7, "sources.0: Input should be a valid dict"),
    ("split_rule.validation_below", "all", "split_rule.validation_below: String"),
    ("unknown", 1, "unknown: Extra inputs"),
]


@pytest.mark.parametrize(("place", "value", "reason"), WRONG, ids=str)
def test_wrong_content_is_refused_with_its_place(
    place: str, value: Any, reason: str, tmp_path: Path
) -> None:
    manifest = forge_pool(tmp_path / "pool", put(place, value))
    with pytest.raises(ShardError) as caught:
        TokenPool(manifest)
    assert reason in str(caught.value)
    assert str(manifest) in str(caught.value)


def test_no_manifest_at_all(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    for text, reason in (
        ("[" * 200_000, "nested too deeply"),
        ('{"a":' * 200_000, "nested too deeply"),
        ("[" + "[]," * CONTAINERS, "more than 1,000,000 objects"),
        ("[]", "no JSON object"),
        ("9" * 5000, "Exceeds the limit"),
    ):
        path.write_text(text)
        with pytest.raises(ShardError, match=reason):
            Manifest.load(path)
    os.truncate(path, MANIFEST_BYTES + 1)
    with pytest.raises(ShardError, match="larger than 67,108,864 bytes"):
        Manifest.load(path)


def read_everything(manifest: Path) -> None:
    pool = TokenPool(manifest, verify="off")
    pool.tokens(0, 10)
    SeparatorIndex(pool.manifest, pool.source.index(pool.manifest), verify=False)


@pytest.mark.parametrize("name", ["manifest.json", "train-000000.tar", "documents.bin"])
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_pipes_and_devices_are_not_read(name: str, kind: str, tmp_path: Path) -> None:
    manifest = forge_pool(tmp_path / "pool", lambda content: None)
    (manifest.parent / name).unlink()
    if kind == "pipe":
        os.mkfifo(manifest.parent / name)
    else:
        (manifest.parent / name).symlink_to("/dev/zero")
    with pytest.raises(ShardError, match=r"not a regular file|outside its folder"):
        read_everything(manifest)


def test_a_message_lists_few_problems_and_repeats_no_values(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    write_pool_manifest(path, {f"key{i}": "secret" * 1000 for i in range(100)})
    with pytest.raises(ShardError) as caught:
        Manifest.load(path)
    assert "more" in str(caught.value)
    assert "secret" not in str(caught.value)
    assert len(str(caught.value)) < 2000


def test_an_earlier_manifest_is_still_one() -> None:
    for split in ("train", "validation"):
        assert Manifest.load(RUN / "pool" / split / "manifest.json").split == split
