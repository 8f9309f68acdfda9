"""Random changes of manifests, mixes and checkpoints end in the formats' errors, and no other way.

Every change keeps the hashes right, as an attacker would. What is still accepted must be usable to
the end: a pool that opens can be read, a checkpoint that verifies can be copied.
"""

from __future__ import annotations

import copy
import json
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from forging import RUN, forge_checkpoint, forge_pool, replace_file
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_pipeline.errors import DataError
from data_pipeline.progress import Silent
from data_pipeline.shards.pool import TokenPool
from data_pipeline.shards.verify import pool_problems
from data_pipeline.stream.budget import Budget
from data_pipeline.stream.cursor import Cursor
from data_pipeline.stream.inspection import pool_statistics
from data_pipeline.stream.open_stream import open_stream
from data_pipeline.stream.stream import TokenStream
from data_pipeline.tokenizer import load_tokenizer
from parallel.checkpoint import load_weights, reshard_checkpoint, verify_checkpoint
from parallel.errors import CheckpointError
from parallel.weights_file import read_header

pytestmark = pytest.mark.slow
fuzz = settings(
    max_examples=400,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.integers(-2, 70_000),
    st.floats(),
    st.text(max_size=12),
    st.sampled_from(["", "..", "../x", "/etc/passwd", "a\0b", "<u4", "0" * 64, "0" * 32, "1e9"]),
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=5,
)


def places(tree: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) below a JSON value."""
    found = []
    for key in list(tree) if isinstance(tree, dict) else range(len(tree)):
        found.append((tree, key))
        if isinstance(tree[key], dict | list):
            found += places(tree[key])
    return found


def mutate(tree: Any, data: st.DataObject) -> None:
    """Change, remove, add or repeat one to three values somewhere in a JSON tree."""
    for _ in range(data.draw(st.integers(1, 3))):
        found = places(tree)
        if not found:
            return
        container, key = found[data.draw(st.integers(0, len(found) - 1))]
        action = data.draw(st.sampled_from(["change", "remove", "add", "swap"]))
        if action == "change":
            container[key] = data.draw(values)
        elif action == "remove":
            del container[key]
        elif action == "swap":
            other, place = found[data.draw(st.integers(0, len(found) - 1))]
            container[key] = copy.deepcopy(other[place])
        elif isinstance(container, dict):
            container[data.draw(st.text(max_size=8))] = data.draw(values)
        else:
            container.append(data.draw(values))


def files_below(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


@fuzz
@given(st.data())
def test_pools(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("pool")
    manifest = forge_pool(folder / "pool", lambda content: mutate(content, data))
    before = files_below(folder)
    problems = pool_problems(manifest, Silent())
    try:
        pool = TokenPool(manifest)
        stream = TokenStream(
            pool, Budget(None, 64, pool.num_tokens), seed=1, epochs=1, documents="masked"
        )
        stream.read(np.arange(min(4, stream.total_positions)))
        pool_statistics(pool)
    except DataError:
        pass
    else:
        assert not problems
    assert files_below(folder) == before
    shutil.rmtree(folder)


@fuzz
@given(st.data())
def test_mixes(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("mix")
    mix = {
        "format": "mixture/1",
        "mode": data.draw(st.sampled_from(["weighted", "proportional"])),
        "sources": [
            {"name": name, "manifest": str(RUN / "pool" / name / "manifest.json")}
            | {"unique_tokens": 2000, "weight": 1.0, "max_epochs": 3.0}
            for name in ("train", "validation")
        ],
    }
    mutate(mix, data)
    (folder / "mix.json").write_text(json.dumps(mix))
    with suppress(DataError):
        open_stream(folder / "mix.json", seed=1, seq_length=32, epochs=1)
    shutil.rmtree(folder)


@fuzz
@given(st.data())
def test_checkpoints(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("checkpoint")
    path = forge_checkpoint(folder, lambda content: mutate(content, data))
    before = files_below(folder)
    try:
        verify_checkpoint(path)
    except CheckpointError:
        assert files_below(folder) == before
    else:
        load_weights(path)
        reshard_checkpoint(path, folder / "copy", files=2)
        assert all(p.is_relative_to(folder / "copy") for p in files_below(folder) - before)
    shutil.rmtree(folder)


@fuzz
@given(st.data())
def test_files_of_tensors(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Bytes of a file change, or its header as JSON; size and hash are stated rightly."""
    folder = tmp_path_factory.mktemp("tensors")
    path = forge_checkpoint(folder, lambda content: None)
    file = path / "weights.safetensors"
    content = bytearray(file.read_bytes())
    size = int.from_bytes(content[:8], "little")
    if data.draw(st.booleans()):
        header = json.loads(content[8 : 8 + size])
        mutate(header, data)
        text = json.dumps(header).encode()
        content[: 8 + size] = len(text).to_bytes(8, "little") + text
    else:
        for _ in range(data.draw(st.integers(1, 8))):
            content[data.draw(st.integers(0, size + 8))] = data.draw(st.integers(0, 255))
        del content[data.draw(st.integers(0, 2 * len(content))) :]
    replace_file(path, file.name, bytes(content))
    for use in (verify_checkpoint, load_weights, lambda p: read_header(p / file.name)):
        with suppress(CheckpointError):
            use(path)
    shutil.rmtree(folder)


@fuzz
@given(st.data())
def test_raw_bytes(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Bytes of a manifest or tokenizer change at random places, without any hash put right."""
    folder = tmp_path_factory.mktemp("raw")
    source = data.draw(
        st.sampled_from(
            [
                "pool/train/manifest.json",
                "checkpoints/step-00000008/manifest.json",
                "pool/tokenizer.model",
            ]
        )
    )
    content = bytearray((RUN / source).read_bytes())
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    del content[data.draw(st.integers(0, 2 * len(content))) :]
    path = folder / Path(source).name
    path.write_bytes(bytes(content))
    with suppress(DataError, CheckpointError):
        if path.suffix == ".model":
            load_tokenizer(path)
        elif "pool" in source:
            TokenPool(path)
        else:
            verify_checkpoint(folder)
    shutil.rmtree(folder)


def small_tokenizer() -> dict[str, Any]:
    """A `tokenizer.json` of a byte-level BPE with special tokens, as a value."""
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel()
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=40, special_tokens=["<pad>", "<mask>"], show_progress=False
    )
    made.train_from_iterator(["text of some kind, of some kind"], trainer)
    return json.loads(made.to_str())


@fuzz
@given(st.data())
def test_tokenizer_json(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    content = small_tokenizer()
    mutate(content, data)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    path.write_text(json.dumps(content))
    with suppress(DataError):
        assert load_tokenizer(path).record.vocab_size > 0
    shutil.rmtree(path.parent)


@fuzz
@given(values)
def test_cursors(value: Any) -> None:
    with pytest.raises(DataError):
        Cursor.from_dict(value)
