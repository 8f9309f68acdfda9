"""Short convolutions: their definition by loops, and that they read nothing that is hidden."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from small import FAMILIES, build, clean_batch

from pretrain.batch import AttentionRule
from pretrain.config.model import ModelConfig
from pretrain.model import convolution
from pretrain.model.convolution import (
    _plain,
    convolve,
    kernel_offsets,
    readable_neighbours,
)
from pretrain.noise.key import NoiseKey

S, B, H = 11, 3, 4
SEGMENT = torch.tensor([[0] * 4 + [1] * 7, [0] * 11, [0] + [1] * 5 + [2] * 5])
VALID = torch.arange(S) < torch.tensor([[11], [6], [9]])
PLACE = torch.arange(S).expand(B, S)
HIDING = (
    torch.where(PLACE % 3 == 0, 1 << 30, 0),
    torch.randint(1 << 31, (B, S), generator=torch.Generator().manual_seed(9)),
)
RULES = {
    "bidirectional": AttentionRule("bidirectional"),
    "causal": AttentionRule("causal"),
    "documents": AttentionRule.from_documents(SEGMENT, VALID, causal=False),
    "causal documents": AttentionRule.from_documents(SEGMENT, VALID, causal=True),
    "blocks": AttentionRule.from_columns(SEGMENT, PLACE // 3, PLACE // 3, PLACE // 3),
    "hiding": AttentionRule.from_columns(SEGMENT, PLACE, PLACE, PLACE, HIDING),
}
KERNELS = [(4, True), (5, False), (2, True), (3, False), (25, False), (30, True)]


def dense(rule, length=S, rows=B):
    """Who reads whom, bool [b, s, s]."""
    if rule.columns is not None:
        return rule.mask()[:, 0]
    every = torch.ones(length, length, dtype=torch.bool)
    return (every.tril() if rule.kind == "causal" else every).expand(rows, -1, -1)


def by_loops(x, weight, rule, offsets):
    """The definition, one neighbour after the other; x [s, b, h]."""
    may = dense(rule)
    rows = []
    for l in range(S):
        for row in range(B):
            y = x[l, row]
            for d, w in zip(offsets, weight, strict=True):
                m = l + d
                if 0 <= m < S and may[row, l, m]:
                    y = y + w * x[m, row]
            rows.append(y)
    return torch.stack(rows).view(S, B, H)


@pytest.mark.parametrize(("kernel", "causal"), KERNELS, ids=str)
@pytest.mark.parametrize("name", RULES)
def test_values_and_gradients_are_those_of_loops(name, kernel, causal):
    """In float64, also where the kernel is longer than the sequence; both forms."""
    rule = RULES[name]
    g = torch.Generator().manual_seed(0)
    x, upstream = torch.randn(2, S, B, H, dtype=torch.float64, generator=g)
    weight = torch.randn(kernel, H, dtype=torch.float64, generator=g)
    offsets = kernel_offsets(kernel, causal)
    readable = readable_neighbours(rule, offsets, x)
    results = []
    for form in (
        lambda x, w: by_loops(x, w, rule, offsets),
        lambda x, w: convolve(x, w, readable, -offsets.start),
        lambda x, w: _plain(x, w, readable, -offsets.start),
    ):
        leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
        y = form(*leaves)
        (y * upstream).sum().backward()
        results.append((y.detach(), *(leaf.grad for leaf in leaves)))
    for found in results[1:]:
        for got, want in zip(found, results[0], strict=True):
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_only_rules_that_hide_need_a_mask():
    x = torch.zeros(S, B, H)
    masks = {
        (name, causal): readable_neighbours(RULES[name], kernel_offsets(5, causal), x)
        for name in RULES
        for causal in (False, True)
    }
    free = {key for key, mask in masks.items() if mask is None}
    assert free == {("bidirectional", False), ("bidirectional", True), ("causal", True)}


def test_a_kernel_reads_back_or_on_both_sides():
    assert list(kernel_offsets(4, causal=True)) == [-3, -2, -1, 0]
    assert list(kernel_offsets(5, causal=False)) == [-2, -1, 0, 1, 2]


SEPARATE = torch.tensor([[0] * 9 + [1] * 15, [0] * 12 + [1] * 12, [0] + [1] * 20 + [2] * 3])
CASES = {
    "autoregressive": ({"name": "autoregressive"}, 4),
    "hidden queries": ({"name": "autoregressive", "hide": "queries", "hide_share": 0.6}, 4),
    "hidden tokens": ({"name": "autoregressive", "hide": "tokens", "hide_share": 0.4}, 4),
    "masked": ({"name": "masked"}, 5),
    "uniform": ({"name": "uniform"}, 5),
    "interpolating": ({"name": "interpolating"}, 5),
    "gaussian": ({"name": "gaussian", "embedding_size": 4}, 5),
    "distillation": ({"name": "distillation", "round_sequences": 3}, 5),
    # Refused by the configuration, because their neighbours are elsewhere; hidden ones stay hidden.
    "block": (FAMILIES["block"], 5),
    "esoteric": (FAMILIES["esoteric"], 5),
}


def convolved(topology, objective, kernel):
    """A module of two layers."""
    return build(topology, objective, short_convolution=kernel, num_layers=2).eval()


def batch_of(module, documents):
    clean = clean_batch()  # one row ends early
    if documents:
        clean = replace(clean, segment=SEPARATE.int(), one_segment=False)
    return module.objective.corrupt(clean, NoiseKey(5, clean.position))


@torch.no_grad()
def hidden(module, batch, ids):
    """Hidden states [s, b, h] of inputs that are embeddings of `ids`, whatever the family."""
    x = module.model.embedding(ids).transpose(0, 1).contiguous()
    return module.model(ids, batch.positions, batch.attention, carried=(x,))


def reachable(batch, layers=2):
    """What may reach a token through the layers, bool [b, s, s].

    In each, three times: the token reads keys, made of their neighbours, and then its own.
    """
    rows, length = batch.ids.shape[:2]
    may, reach = dense(batch.attention, length, rows).float(), torch.eye(length)
    for _ in range(3 * layers):
        reach = (reach @ may).clamp(max=1.0)
    return reach > 0


def leaks(module, batch):
    """Pairs (token, token that it may not read) between which something passes; and all pairs."""
    ids = batch.ids if batch.ids.dim() == 2 else batch.ids[..., 0]
    before, may = hidden(module, batch, ids), reachable(batch)
    found = pairs = 0
    for m in range(ids.shape[1]):
        changed = ids.clone()
        changed[:, m] = 5 + (ids[:, m] + 17) % 90
        moved = (hidden(module, batch, changed) != before).any(dim=-1).t()  # [b, s]
        assert moved[:, m].all()
        found += int((moved & ~may[:, :, m]).sum())
        pairs += int((~may[:, :, m]).sum())
    return found, pairs


@pytest.mark.parametrize("documents", [False, True], ids=["packed", "documents"])
@pytest.mark.parametrize("name", CASES)
def test_what_the_rule_hides_changes_no_bit(topology, name, documents):
    """Every token in turn, in rows that end early, with documents kept apart."""
    objective, kernel = CASES[name]
    module = convolved(topology, objective, kernel)
    found, pairs = leaks(module, batch_of(module, documents))
    assert found == 0 and pairs > 100


@pytest.mark.parametrize("name", ["autoregressive", "hidden tokens", "masked", "block"])
def test_without_its_mask_a_convolution_would_leak(topology, monkeypatch, name):
    monkeypatch.setattr("pretrain.model.transformer.readable_neighbours", lambda *_: None)
    objective, kernel = CASES[name]
    module = convolved(topology, objective, kernel)
    found, _ = leaks(module, batch_of(module, documents=name == "autoregressive"))
    assert found > 0


@pytest.mark.parametrize("family", ["autoregressive", "masked"])
def test_a_model_with_weights_of_zero_is_the_one_without(topology, family):
    """Bit for bit; parameters have the same names and first values but for the convolutions'."""
    plain, with_ = (
        build(topology, FAMILIES[family], short_convolution=k, num_layers=2)
        for k in (0, CASES[family][1])
    )
    ours, theirs = dict(with_.named_parameters()), dict(plain.named_parameters())
    assert {name for name in ours if name not in theirs} == {
        f"model.layers.{i}.{part}_convolution.weight"
        for i in (0, 1)
        for part in ("attention", "mlp")
    }
    assert all(torch.equal(ours[name], weight) for name, weight in theirs.items())
    for name, weight in ours.items():
        if "convolution" in name:
            assert weight.std().item() == pytest.approx((3 * len(weight)) ** -0.5, rel=0.3)
            weight.data.zero_()
    losses = [module(batch_of(module, documents=False)) for module in (plain, with_)]
    assert torch.equal(*losses)
    losses[1].backward()
    for name, weight in ours.items():
        if "convolution" in name:
            assert weight.grad.abs().min(dim=1).values.max() > 0, name


def test_a_null_is_zero():
    assert ModelConfig(short_convolution=None).short_convolution == 0
    with pytest.raises(ValueError, match="reads no neighbour"):
        ModelConfig(short_convolution=1)


def test_the_mask_is_built_once_a_batch(topology, monkeypatch):
    calls = []
    build_mask = convolution.readable_neighbours
    monkeypatch.setattr(
        "pretrain.model.transformer.readable_neighbours",
        lambda *arguments: calls.append(1) or build_mask(*arguments),
    )
    module = convolved(topology, FAMILIES["masked"], 5)
    module(batch_of(module, documents=True))
    assert len(calls) == 1
