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


@pytest.mark.parametrize("causal", [True, False])
def test_documents_are_read_apart(causal: bool) -> None:
    """Columns and bounds of the fast path, each against the sentence that defines it."""
    segment = torch.tensor([[0, 0, 0, 1, 1, 2], [0, 0, 0, 0, 0, 0], [4, 4, 5, 5, 5, 5]])
    valid = torch.tensor([[True] * 6, [True] * 4 + [False] * 2, [False] * 6])
    rule = AttentionRule.from_documents(segment, valid, causal=causal)
    mask = rule.mask()[:, 0]
    for b in range(3):
        for q in range(6):
            for k in range(6):
                whole = valid[b, q] and valid[b, k] and segment[b, q] == segment[b, k]
                expected = q == k or bool(whole and (k < q or not causal))
                assert bool(mask[b, q, k]) == expected, (b, q, k)
    assert rule.documents is not None and rule.documents.causal == causal
    # 3, 2 and 1 tokens; 4 and two that are not valid; six that are not.
    assert rule.documents.starts.tolist() == [0, 3, 5, 6, 10, 11, 12, 13, 14, 15, 16, 17, 18]
    assert rule.documents.longest == 4


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
