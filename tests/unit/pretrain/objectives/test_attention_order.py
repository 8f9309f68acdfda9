"""Attention of block, Eso-LM and hidden tokens, each written out from its paper by brute force."""

import numpy as np
import pytest
import torch

from pretrain.batch import AttentionRule, CleanBatch
from pretrain.objectives.attention_order import concatenate, isolated, ordered, pair


def clean(n, s, valid=None, segment=None):
    return CleanBatch(
        tokens=torch.zeros(n, s, dtype=torch.int64),
        position=torch.arange(n),
        segment=torch.zeros(n, s, dtype=torch.int32) if segment is None else segment,
        valid=torch.ones(n, s, dtype=torch.bool) if valid is None else valid,
        all_valid=valid is None,
    )


def block_mask(n, size):
    """BD3-LM: rows are queries; [0, n) noisy, [n, 2n) clean."""
    i = np.arange(2 * n)
    is_clean, block = i >= n, (i % n) // size
    q, k = np.s_[:, None], np.s_[None, :]
    own = (block[q] == block[k]) & (is_clean[q] == is_clean[k])
    past = (block[q] > block[k]) & is_clean[k] & ~is_clean[q]
    return own | past | ((block[q] >= block[k]) & is_clean[k] & is_clean[q])


def mask_of(columns):
    return columns.rule().mask()[:, 0].numpy()


@pytest.mark.parametrize(("n", "size"), [(4, 1), (4, 2), (4, 4), (12, 3), (7, 3), (16, 4)])
def test_pair_of_blocks_is_the_block_diffusion_mask(n, size):
    order = (torch.arange(n) // size).expand(2, n)
    mask = mask_of(pair(clean(2, n), order))
    assert (mask == block_mask(n, size)).all()
    if n % size == 0:
        assert mask[0].sum() == n * n + n * size
    if size == n:
        assert not mask[0, :n, n:].any()
    if size == 1:  # Eso-LM's sequential mask: eye | strictly causal | causal
        assert (mask[0, :n, :n] == np.eye(n)).all()
        assert (mask[0, :n, n:] == np.tril(np.ones((n, n)), -1)).all()
        assert (mask[0, n:, n:] == np.tril(np.ones((n, n)))).all()


def test_ordered_is_causal_in_a_permuted_sequence():
    order = torch.stack(
        [torch.randperm(9, generator=torch.Generator().manual_seed(i)) for i in (1, 2)]
    )
    mask = mask_of(ordered(clean(2, 9), order))
    for b in range(2):
        place = order[b].argsort()
        assert (mask[b][place][:, place] == np.tril(np.ones((9, 9)))).all()


def test_invalid_positions_and_other_documents_are_out_of_reach():
    valid = torch.tensor([[True] * 5 + [False], [True] * 6])
    segment = torch.tensor([[0, 0, 0, 0, 0, 0], [0, 0, 1, 1, 1, 2]], dtype=torch.int32)
    batch = clean(2, 6, valid, segment)
    order = (torch.arange(6) // 2).expand(2, 6)
    for columns in (ordered(batch, order), pair(batch, order)):
        mask = mask_of(columns)
        copies = mask.shape[1] // 6
        for c in range(copies):
            at = 6 * c + 5
            assert mask[0, at].sum() == 1 and mask[0, :, at].sum() == 1 and mask[0, at, at]
        documents = np.tile(segment[1].numpy(), copies)
        assert not mask[1][documents[:, None] != documents[None, :]].any()


def test_parts_of_a_row_do_not_read_each_other():
    order = torch.arange(4).expand(1, 4)
    one, two = ordered(clean(1, 4), order), pair(clean(1, 4), order)
    mask = mask_of(concatenate(one, two))[0]
    assert (mask[:4, :4] == mask_of(one)[0]).all() and (mask[4:, 4:] == mask_of(two)[0]).all()
    assert not mask[:4, 4:].any() and not mask[4:, :4].any()
    assert (mask_of(isolated(one))[0] == np.eye(4)).all()


def test_keyed_hiding_has_its_frequency_and_spares_the_own_position():
    n, s = 40, 64
    place = torch.arange(s).expand(n, s)
    probability = torch.linspace(0, 0.999, s).expand(n, s)
    salt = torch.randint(0, 2**31, (n, s), generator=torch.Generator().manual_seed(0))
    hiding = ((probability.double() * 2**31).long(), salt)
    rule = AttentionRule.from_columns(torch.zeros(n, s), place, place, place, hiding)
    mask = rule.mask()[:, 0].numpy()
    causal = np.tril(np.ones((s, s), dtype=bool))
    assert not mask[:, ~causal].any()
    assert mask[:, np.arange(s), np.arange(s)].all()
    for q in range(1, s):
        expected, count = q * n * (1 - float(probability[0, q])), q * n
        spread = np.sqrt(
            max(count * float(probability[0, q]) * (1 - float(probability[0, q])), 1e-9)
        )
        assert abs(mask[:, q, :q].sum() - expected) <= 4.5 * spread
    # Keys are hidden independently of each other and of the query beside.
    late = mask[:, s // 2 :, : s // 2].reshape(-1, s // 2).astype(float)
    late -= late.mean(axis=1, keepdims=True)
    correlation = (late[:, :-1] * late[:, 1:]).mean() / (late**2).mean()
    assert abs(correlation) < 4 / np.sqrt(late.size) + 2 / s
