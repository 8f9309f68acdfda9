"""The streaming writer against the safetensors library, and its hash against the file."""

from __future__ import annotations

import hashlib

import pytest
import torch
from safetensors.torch import load_file

from parallel.checkpoint.writer import TensorWriter


def test_the_library_reads_back_the_same_bits_and_the_hash_is_the_files(tmp_path) -> None:
    tensors = {
        "b": torch.randn(3, 5),
        "a": torch.tensor([float("nan"), -0.0, 1e-42]),
        "empty": torch.zeros(0, 4),
        "scalar": torch.tensor(2.5),
        "transposed": torch.randn(4, 6).t(),
    }
    path = tmp_path / "x.safetensors"
    writer = TensorWriter(path, {name: list(t.shape) for name, t in tensors.items()})
    for name, tensor in tensors.items():
        writer.append(name, tensor)
    entry = writer.close()
    read = load_file(path)
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(read[name].view(torch.int32), tensor.contiguous().view(torch.int32))
    assert entry.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert entry.bytes == path.stat().st_size


def test_an_abandoned_file_is_gone_and_a_forgotten_tensor_is_noticed(tmp_path) -> None:
    path = tmp_path / "x.safetensors"
    writer = TensorWriter(path, {"a": [2], "b": [2]})
    writer.append("a", torch.ones(2))
    with pytest.raises(AssertionError, match="never written"):
        writer.close()
    writer.abandon()
    assert not path.exists()
