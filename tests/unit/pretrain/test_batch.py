"""Moving a batch to a GPU goes through pinned memory and changes nothing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pretrain.batch import AttentionRule, TrainBatch


def batch() -> TrainBatch:
    columns = torch.arange(4 * 2 * 3, dtype=torch.int32).reshape(4, 2, 3)
    return TrainBatch(
        ids=torch.arange(6).reshape(2, 3),
        positions=torch.arange(3)[None],
        attention=AttentionRule("columns", columns),
        noise_level=None,
        rows=None,
        targets=torch.arange(6),
        weight=torch.ones(6),
        sequence=torch.arange(6) // 3,
        extra={"alpha": torch.rand(6)},
    )


def tensors(value: TrainBatch) -> list[Tensor]:
    """Every tensor of a batch, wherever it stands."""
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    value._each(note)
    return found


def test_a_cpu_batch_keeps_its_memory() -> None:
    """Without a GPU nothing is pinned and nothing is copied, in any field."""
    before = batch()
    after = before.to(torch.device("cpu"))
    addresses = [[t.data_ptr() for t in tensors(b)] for b in (before, after)]
    assert addresses[0] == addresses[1]
    assert len(addresses[0]) == 7


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_every_tensor_is_pinned_and_arrives_unchanged() -> None:
    before = batch()
    pinned, after = before.pin(), before.to(torch.device("cuda"))
    assert all(t.is_pinned() for t in tensors(pinned))
    for ours, theirs in zip(tensors(before), tensors(after), strict=True):
        assert theirs.is_cuda
        assert torch.equal(ours, theirs.cpu())
    assert all(t.is_cuda for t in tensors(after.pin()))
