"""Block diffusion, Eso-LM and token orders: exact languages, the real network, each other."""

import math

import numpy as np
import pytest
import torch
import toy_language as toy

from pretrain.batch import AttentionRule, TrainBatch
from pretrain.config.objectives import objectives
from pretrain.config.run import ModelConfig
from pretrain.noise.key import NoiseKey
from pretrain.objectives import build_objective
from pretrain.vocabulary import TokenSpace

CASES = [
    ("block", {"block_size": 1}),
    ("block", {"block_size": 2}),
    ("block", {"block_size": 3}),
    ("esoteric", {"alpha0": 1.0}),
    ("esoteric", {"alpha0": 0.5}),
    ("esoteric", {"alpha0": 0.25, "diffusion_share": 0.3}),
    ("esoteric", {"alpha0": 0.0}),
]


def objective(name, **fields):
    return build_objective(objectives.make(name=name, time_window=64, **fields), toy.SPACE)


@pytest.mark.parametrize(("name", "fields"), CASES, ids=str)
@pytest.mark.parametrize("method", ["bound_batch", "corrupt"])
def test_exact_conditionals_give_minus_log_p(name, fields, method):
    """Also proves that no target leaks: what a row knows follows from the attention mask alone."""
    family, n, x = objective(name, **fields), 6000, (0, 1, 2)
    clean = toy.clean_batch([x] * n, range(n))
    batch = getattr(family, method)(clean, NoiseKey(1, clean.position))
    loss = family.token_bound(toy.reading_chunk(batch), batch.targets, batch.extra)
    each = torch.zeros(n, dtype=torch.float64)
    each.index_add_(0, batch.sequence, loss * batch.weight.double())
    error = float(each.std()) / math.sqrt(n)
    assert abs(float(each.mean()) + math.log(toy.JOINT[x])) < 4 * error + 1e-12
    if family.exact_likelihood and method == "bound_batch":
        assert error < 1e-12


def test_simple_esoteric_loss_has_weight_one():
    family = objective("esoteric", loss="simple")
    clean = toy.clean_batch([(0, 1, 2)] * 50, range(50))
    weight = family.corrupt(clean, NoiseKey(1, clean.position)).weight
    assert torch.equal(weight, torch.ones_like(weight))


@pytest.fixture(scope="module")
def network(topology):
    from pretrain.model.initialize import initialize
    from pretrain.model.transformer import Transformer

    space = TokenSpace(9, 16, 0, 4, 5, (0, 1, 2, 3, 4))
    config = ModelConfig(
        num_layers=2, hidden_size=16, num_attention_heads=2, vocab_multiple=16, init_std=0.5
    )
    model = Transformer(config, space, topology)
    initialize(model, seed=1)
    return model


def module(network, family):
    from pretrain.module import ObjectiveModule

    return ObjectiveModule(network, family)


def long_batch(n=6, s=12, valid=None):
    tokens = torch.randint(0, 3, (n, s), generator=torch.Generator().manual_seed(5))
    return toy.clean_batch(tokens, range(n), valid)


@torch.no_grad()
def two_stream_nll(network, tokens):
    """-log p by running every prefix followed by one <mask>: no copy, no special attention."""
    total = []
    for row in tokens:
        nll = 0.0
        for l in range(len(row)):
            ids = torch.cat((row[:l], torch.tensor([toy.SPACE.mask_id])))[None]
            hidden = network(ids, torch.arange(l + 1)[None], AttentionRule("causal"))
            nll += float(network.vocabulary(hidden[-1]).cross_entropy(row[l : l + 1]))
        total.append(nll)
    return torch.tensor(total, dtype=torch.float64)


def test_block_of_one_is_the_two_stream_causal_likelihood(network):
    """And needs no randomness: with clip [1, 1] training has the same value and no variance."""
    family = objective("block", block_size=1, clip=(1.0, 1.0))
    clean = long_batch()
    expected = two_stream_nll(network, clean.tokens)
    for seed, method in ((1, "bound_batch"), (2, "corrupt")):
        batch = getattr(family, method)(clean, NoiseKey(seed, clean.position))
        with torch.no_grad():
            got = module(network, family)(batch, exact=True)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=0)


def test_esoteric_without_diffusion_is_the_same_likelihood(network):
    family = objective("esoteric", alpha0=0.0)
    clean = long_batch()
    batch = family.bound_batch(clean, NoiseKey(3, clean.position))
    with torch.no_grad():
        got = module(network, family)(batch, exact=True)
    torch.testing.assert_close(got, two_stream_nll(network, clean.tokens), rtol=1e-5, atol=0)


def test_one_block_is_masked_diffusion(network):
    """The same masks in both: equal losses, and the clean half changes nothing."""
    family, masked = objective("block", block_size=12), objective("masked")
    clean = long_batch()
    batch = family.bound_batch(clean, NoiseKey(1, clean.position))
    s = clean.tokens.shape[1]
    single = TrainBatch(
        ids=batch.ids[:, :s],
        positions=torch.arange(s)[None],
        attention=AttentionRule("bidirectional"),
        noise_level=None,
        rows=batch.rows // (2 * s) * s + batch.rows % (2 * s),
        targets=batch.targets,
        weight=batch.weight,
        sequence=batch.sequence,
    )
    other = batch.ids.clone()
    other[:, s:] = 6
    changed = TrainBatch(**{**batch.__dict__, "ids": other})
    with torch.no_grad():
        expected = module(network, masked)(single, exact=True)
        for b in (batch, changed):
            got = module(network, family)(b, exact=True)
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=0)
    # And masks and weights have the masked family's law: fixed counts, uniform over 1..L.
    clean = long_batch(4000)
    batch = family.bound_batch(clean, NoiseKey(1, clean.position))
    counts = (batch.ids[:, :s] == toy.SPACE.mask_id).sum(dim=1)
    assert abs(np.bincount(counts, minlength=13)[1:] / 4000 - 1 / 12).max() < 4 * 0.0044
    torch.testing.assert_close(batch.weight, (s / counts.double())[batch.sequence])


@pytest.mark.parametrize(("name", "fields"), CASES, ids=str)
@pytest.mark.parametrize("method", ["bound_batch", "corrupt"])
def test_invalid_positions_are_never_noised_read_or_counted(network, name, fields, method):
    family = objective(name, **fields)
    valid = torch.ones(4, 12, dtype=torch.bool)
    valid[0, 9:], valid[1] = False, False
    clean = long_batch(4, valid=valid)
    batch = getattr(family, method)(clean, NoiseKey(1, clean.position))
    copies = batch.ids.shape[1] // 12
    everywhere = valid.repeat(1, copies)
    assert (batch.ids[~everywhere] != toy.SPACE.mask_id).all()
    assert not set(batch.sequence[batch.weight > 0].tolist()) & {1}
    other = torch.where(everywhere, batch.ids, 7)
    with torch.no_grad():
        a = module(network, family)(batch, exact=True)
        b = module(network, family)(TrainBatch(**{**batch.__dict__, "ids": other}), exact=True)
    assert torch.isfinite(a).all() and a[1] == 0
    torch.testing.assert_close(a, b, rtol=1e-6, atol=0)


def test_blocks_have_their_own_stratified_levels_inside_the_interval():
    family = objective("block", block_size=4, clip=(0.3, 0.8))
    clean = long_batch(512)
    batch = family.corrupt(clean, NoiseKey(1, clean.position))
    t = 1 / batch.weight.double()
    assert float(t.min()) >= 0.3 and float(t.max()) <= 0.8
    block = (batch.rows % 24) // 4
    for s in range(20):
        for b in range(3):
            assert len(t[(batch.sequence == s) & (block == b)].unique()) <= 1
    share = len(batch.rows) / clean.tokens.numel()
    assert abs(share - 0.55) < 0.02


@pytest.mark.parametrize("kind", ["local", "random"])
def test_orders_are_fixed_few_and_undone_by_positions(kind):
    family = objective("autoregressive", orders=4, order_kind=kind)
    clean = long_batch(400, 24)
    batch = family.corrupt(clean, NoiseKey(9, clean.position))
    n, s = clean.tokens.shape
    # Place j predicts the token of the position that place j + 1 reads, minus one (the <doc>).
    order = torch.cat((batch.positions[:, 1:] - 1, torch.full((n, 1), -1)), dim=1)
    missing = torch.arange(s).sum() - order[:, :-1].sum(dim=1)
    order[:, -1] = missing
    assert torch.equal(order.sort(dim=1).values, torch.arange(s).expand(n, s))
    assert torch.equal(batch.targets.view(n, s), clean.tokens.gather(1, order))
    assert torch.equal(batch.ids[:, 1:], batch.targets.view(n, s)[:, :-1])
    assert (batch.ids[:, 0] == toy.SPACE.doc_id).all() and (batch.positions[:, 0] == 0).all()
    distinct, counts = np.unique(order.numpy(), axis=0, return_counts=True)
    assert len(distinct) == 4 and abs(counts / n - 0.25).max() < 4 * math.sqrt(0.1875 / n)
    assert (distinct == np.arange(s)).all(axis=1).sum() == 1
    if kind == "local":  # order 3 is perturbed by a normal of 3 positions
        assert abs(distinct - np.arange(s)).max() < 18
    # The likelihood knows nothing of orders.
    plain = family.bound_batch(clean, NoiseKey(9, clean.position))
    assert plain.attention.kind == "causal" and torch.equal(plain.targets, clean.tokens.flatten())


@pytest.mark.parametrize("kind", ["queries", "tokens"])
def test_hiding_the_past_concerns_its_share_and_never_the_own_position(kind):
    family = objective("autoregressive", hide=kind, hide_share=0.4)
    clean = long_batch(200, 24)
    mask = family.corrupt(clean, NoiseKey(9, clean.position)).attention.mask()[:, 0]
    n, s = clean.tokens.shape
    lost = torch.ones(s, s).tril(-1).bool() & ~mask
    assert mask[:, torch.arange(s), torch.arange(s)].all()
    assert not (mask & ~torch.ones(s, s).tril().bool()).any()
    if kind == "tokens":
        gone = lost[:, -1, :-1]
        assert torch.equal(lost.any(dim=1)[:, :-1], gone)
        share = float(gone.double().mean())
        assert abs(share - 0.4) < 4 * math.sqrt(0.24 / gone.numel())
    else:
        touched = float(lost[:, -1].any(dim=1).double().mean())
        # One chosen query in two hides a key on average; with 23 keys few hide none.
        assert 0.4 * 0.9 - 0.1 < touched < 0.4 + 4 * math.sqrt(0.24 / n)
        expected = 0.4 * 0.5
        share = float(lost[:, 12:].double().sum() / (n * sum(range(12, s))))
        assert abs(share - expected) < 4 * math.sqrt(0.4 * (1 / 3) / (n * 12))
    assert family.bound_batch(clean, NoiseKey(9, clean.position)).attention.kind == "causal"
