"""Checkpoints with wrong content under right hashes are refused with the place."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from forging import forge_checkpoint, replace_file
from safetensors.torch import load_file, save

from parallel.checkpoint import latest_checkpoint, load_weights, read_manifest, verify_checkpoint
from parallel.errors import CheckpointError
from parallel.weights_file import read_header

WEIGHTS = "weights.safetensors"
NORM = "model.head.norm.weight"


def put(**values: Any) -> Any:
    return lambda content: content.update(values)


WRONG: list[tuple[Any, str]] = [
    (put(shapes=[]), "shapes: Input should be a valid dict"),
    (put(files=[]), "files: Input should be a valid dict"),
    (put(tensors=[]), "tensors: Input should be a valid dict"),
    (put(state=[]), "state: Input should be a valid dict"),
    (put(state=None), "state: Input should be a valid dict"),
    (put(step="8"), "step: Input should be a valid integer"),
    (put(optimizer_step=-1), "optimizer_step: Input should be greater"),
    (put(zero_stage=7), "zero_stage: Input should be less"),
    (put(more=1), "more: Unexpected keyword"),
    (lambda c: c.pop("step"), "step: Field required"),
    (lambda c: c["files"][WEIGHTS].update(sha256="x"), "files.weights.safetensors.sha256: String"),
    (lambda c: c["files"][WEIGHTS].update(bytes=-1), "files.weights.safetensors.bytes: Input"),
    (lambda c: c["files"].pop(WEIGHTS), "do not name the same files: 'weights.safetensors'"),
    (lambda c: c["tensors"].pop(NORM), f"do not name the same parameters: '{NORM}'"),
    (lambda c: c["shapes"].update({NORM: [16, -1]}), f"shapes.{NORM}.1: Input"),
    (lambda c: c["shapes"].update({NORM: [2**50, 2**50]}), f"shapes: {NORM} has"),
    (lambda c: c["shapes"].update({"a/b": [1]}), "shapes: 'a/b' cannot be the name"),
    (lambda c: c["tensors"].update({NORM: "ema.safetensors"}), f"tensors: {NORM} cannot be in"),
]


@pytest.mark.parametrize(("change", "reason"), WRONG, ids=[reason for _, reason in WRONG])
def test_wrong_content_is_refused_with_its_place(change: Any, reason: str, tmp_path: Path) -> None:
    path = forge_checkpoint(tmp_path, change)
    with pytest.raises(CheckpointError) as caught:
        read_manifest(path)
    assert reason in str(caught.value)
    assert str(path) in str(caught.value)
    assert latest_checkpoint(tmp_path) is None


def test_no_manifest_at_all(tmp_path: Path) -> None:
    path = forge_checkpoint(tmp_path, lambda content: None)
    for text in ("[]", "[" * 200_000, '{"format": []}', "\0", "9" * 5000):
        (path / "manifest.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"cannot be read|format"):
            read_manifest(path)


def weights(path: Path, **changes: Any) -> bytes:
    """The weights of a checkpoint with some tensors changed, or left out (None)."""
    tensors = {**load_file(path / WEIGHTS), **changes}
    return save({name: value for name, value in tensors.items() if value is not None})


CONTENTS: list[tuple[Any, str]] = [
    (lambda p: b"garbage" * 1000, "no safetensors file"),
    (lambda p: b"", "no safetensors file"),
    (lambda p: (2**40).to_bytes(8, "little") + b"{}", "no safetensors file"),
    (lambda p: weights(p, **{NORM: torch.ones(16).double()}), f"{NORM} is F64 [16]"),
    (lambda p: weights(p, **{NORM: torch.ones(16).long()}), f"{NORM} is I64 [16]"),
    (lambda p: weights(p, **{NORM: torch.ones(8)}), f"{NORM} is F32 [8], it should be F32 [16]"),
    (lambda p: weights(p, **{NORM: None}), f"it lacks the tensor '{NORM}'"),
    (lambda p: weights(p, extra=torch.ones(1)), "it holds besides the tensor 'extra'"),
]


@pytest.mark.parametrize(("content", "reason"), CONTENTS, ids=[reason for _, reason in CONTENTS])
def test_a_right_hash_does_not_make_a_file_of_tensors(
    content: Any, reason: str, tmp_path: Path
) -> None:
    path = forge_checkpoint(tmp_path, lambda content: None)
    replace_file(path, WEIGHTS, content(path))
    for use in (verify_checkpoint, load_weights):
        with pytest.raises(CheckpointError) as caught:
            use(path)
        assert reason in str(caught.value)


@pytest.mark.parametrize("name", ["manifest.json", WEIGHTS])
def test_pipes_and_devices_are_not_read(name: str, tmp_path: Path) -> None:
    for number, make in enumerate((os.mkfifo, lambda p: p.symlink_to("/dev/zero"))):
        path = forge_checkpoint(tmp_path / str(number), lambda content: None)
        (path / name).unlink()
        make(path / name)
        with pytest.raises(CheckpointError, match=r"regular|outside its folder|is missing"):
            verify_checkpoint(path)


HEADERS: list[tuple[Any, str]] = [
    ([], "no JSON object"),
    ({"a": 1}, "a has no type and shape"),
    ({"a": {"dtype": "F32"}}, "a has no type and shape"),
    ({"a": {"dtype": ["F32"], "shape": []}}, "a has no type and shape"),
    ({"a": {"dtype": "I64", "shape": [1]}}, "a has type I64"),
    ({"a": {"dtype": "F32", "shape": [-1]}}, "a has no shape"),
]


@pytest.mark.parametrize(("header", "reason"), HEADERS, ids=[reason for _, reason in HEADERS])
def test_weights_to_start_from_are_checked_by_their_header(
    header: Any, reason: str, tmp_path: Path
) -> None:
    text = json.dumps(header).encode()
    (tmp_path / "a.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(CheckpointError, match=reason):
        read_header(tmp_path / "a.safetensors")
