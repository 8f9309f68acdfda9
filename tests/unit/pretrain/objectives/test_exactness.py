"""Bounds against languages whose probabilities are known, and the rules every batch must keep."""

import math

import pytest
import torch
import toy_language as toy

from pretrain.config.objectives import objectives
from pretrain.config.run import ModelConfig
from pretrain.noise.key import NoiseKey
from pretrain.objectives import build_objective
from pretrain.vocabulary import TokenSpace


def objective(name, **fields):
    return build_objective(objectives.make(name=name, time_window=64, **fields), toy.SPACE)


@pytest.mark.parametrize("which", ["bound_batch", "corrupt"])
@pytest.mark.parametrize("x", [(0, 1, 2), (2, 2, 0)])
def test_masked_bound_with_exact_conditionals_is_minus_log_p(which, x):
    """With the true conditionals the bound has no gap for any sequence (fixed count and 1/t)."""
    masked, n = objective("masked"), 20_000
    clean = toy.clean_batch([x] * n, range(n))
    batch = getattr(masked, which)(clean, NoiseKey(1, clean.position))
    loss = masked.token_bound(toy.masked_chunk(batch), batch.targets, batch.extra)
    per_draw = torch.zeros(n, dtype=torch.float64).index_add(
        0, batch.sequence, loss * batch.weight.double()
    )
    error = float(per_draw.std()) / math.sqrt(n)
    assert error < 0.05
    assert abs(float(per_draw.mean()) + math.log(toy.JOINT[x])) < 4 * error


def test_fixed_count_has_less_variance_than_independent_masks():
    masked, n = objective("masked"), 5000
    clean = toy.clean_batch([(0, 1, 2)] * n, range(n))
    spread = []
    for batch in (
        masked.bound_batch(clean, NoiseKey(1, clean.position)),
        masked.corrupt(clean, NoiseKey(1, clean.position)),
    ):
        loss = masked.token_loss(toy.masked_chunk(batch), batch.targets, {}) * batch.weight
        total = torch.zeros(n, dtype=torch.float64).index_add(0, batch.sequence, loss.double())
        spread.append(float(total.var()))
    assert spread[0] < spread[1] / 3


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("autoregressive", {}),
        ("masked", {}),
        ("block", {"block_size": 1}),
        ("block", {"block_size": 2}),
        ("esoteric", {"alpha0": 1.0}),
        ("esoteric", {"alpha0": 0.0}),
    ],
)
def test_a_model_that_knows_nothing_has_bound_ln_k(name, fields):
    """Every target can take K ids; mask, pad, control and padding columns have probability zero.

    Exactly so in every draw, because fixed counts cancel their own weights.
    """
    family = objective(name, **fields)
    clean = toy.clean_batch(toy.SEQUENCES, range(len(toy.SEQUENCES)))
    batch = family.bound_batch(clean, NoiseKey(1, clean.position))
    logits = torch.zeros(len(batch.targets), toy.SPACE.padded_vocab_size, dtype=torch.float64)
    logits[:, toy.SPACE.excluded_columns] = -torch.inf
    loss = family.token_bound(
        toy.TableChunk(logits.log_softmax(dim=-1)), batch.targets, batch.extra
    )
    per_token = (loss * batch.weight).sum() / clean.tokens.numel()
    assert toy.SPACE.num_targets == toy.V + 1  # the symbols and <doc>
    assert abs(float(per_token) - math.log(toy.SPACE.num_targets)) < 1e-12


def test_autoregressive_scores_all_positions_and_equals_brute_force(topology):
    """Likelihoods of the real network over all V^L sequences are a distribution, and each equals
    the product of next-token probabilities read off prefix by prefix."""
    from pretrain.model.initialize import initialize
    from pretrain.model.transformer import Transformer
    from pretrain.module import ObjectiveModule

    # Only the three symbols can be targets, so that the distribution is over V^L exactly.
    space = TokenSpace(9, 16, 0, 4, 5, (0, 1, 2, 3, 4))
    config = ModelConfig(
        num_layers=2, hidden_size=16, num_attention_heads=2, vocab_multiple=16, init_std=0.5
    )
    model = Transformer(config, space, topology)
    initialize(model, seed=1)
    module = ObjectiveModule(model, objective("autoregressive"))
    clean = toy.clean_batch(toy.SEQUENCES, range(27))
    batch = module.objective.bound_batch(clean, NoiseKey(0, clean.position))
    with torch.no_grad():
        nll = module(batch, exact=True)
    # Symbols are 3 of the 4 possible targets (<doc> is the other): the sum lacks its mass.
    assert float((-nll).exp().sum()) < 1
    for i in (0, 13, 26):
        total, prefix = 0.0, [space.doc_id]
        for token in clean.tokens[i].tolist():
            ids = torch.tensor([prefix])
            hidden = model(ids, torch.arange(len(prefix))[None], batch.attention)
            logits = model.vocabulary(hidden[-1]).logits.double()[0]
            total -= float(logits.log_softmax(0)[token].detach())
            prefix.append(token)
        assert abs(total - float(nll[i])) < 1e-5


@pytest.mark.parametrize("name", ["masked", "autoregressive"])
@pytest.mark.parametrize("method", ["corrupt", "bound_batch"])
def test_invalid_positions_are_never_noised_read_or_counted(topology, name, method):
    from pretrain.model.initialize import initialize
    from pretrain.model.transformer import Transformer
    from pretrain.module import ObjectiveModule

    config = ModelConfig(num_layers=1, hidden_size=16, num_attention_heads=2, init_std=0.5)
    space = TokenSpace(9, 128, 0, 4, 5, (0, 1, 2, 3, 4))
    family = build_objective(objectives.make(name=name, time_window=8), space)
    model = Transformer(config, space, topology)
    initialize(model, seed=1)
    module = ObjectiveModule(model, family)
    valid = torch.tensor([[True, True, False], [True, True, True], [False, False, False]])
    clean = toy.clean_batch([(0, 1, 2), (1, 1, 1), (0, 0, 0)], [3, 4, 5], valid)
    batch = getattr(family, method)(clean, NoiseKey(1, clean.position))
    assert (batch.ids[~valid] != space.mask_id).all()
    totals = module(batch, exact=True)
    assert totals[2] == 0
    assert torch.isfinite(totals).all()
    # What stands at an invalid position changes nothing.
    other = batch.ids.clone()
    other[0, 2], other[2] = 7, torch.tensor([8, 7, 6])
    changed = type(batch)(**{**batch.__dict__, "ids": other})
    torch.testing.assert_close(module(changed, exact=True), totals, rtol=1e-6, atol=0)


SPARSE = [
    ("masked", {}),
    ("masked", {"loss": "simple", "schedule": "cosine"}),
    ("uniform", {"loss": "simple"}),
    ("interpolating", {"noise": "masked"}),
    ("interpolating", {"noise": "hybrid", "uniform_share": 0.0, "loss": "dynamic"}),
    ("interpolating", {"loss": "cross_entropy"}),
    ("block", {"block_size": 2}),
    ("esoteric", {"alpha0": 1.0}),
    ("esoteric", {"alpha0": 0.5}),
]


@pytest.mark.parametrize(("name", "fields"), SPARSE, ids=str)
def test_head_at_chosen_rows_equals_dense_head(topology, name, fields):
    """Evaluating the head where something is scored is the same loss and gradient as everywhere."""
    from pretrain.model.initialize import initialize
    from pretrain.model.transformer import Transformer
    from pretrain.module import ObjectiveModule

    space = TokenSpace(9, 128, 0, 4, 5, (0, 1, 2, 3, 4))
    config = ModelConfig(num_layers=1, hidden_size=16, num_attention_heads=2, init_std=0.5)
    model = Transformer(config, space, topology)
    initialize(model, seed=1)
    module = ObjectiveModule(model, objective(name, **fields))
    clean = toy.clean_batch(toy.SEQUENCES, range(27))
    batch = module.objective.corrupt(clean, NoiseKey(1, clean.position))
    n = batch.ids.numel()
    assert 0 < len(batch.rows) < n

    def spread(values, filler):
        return torch.full((n,), filler, dtype=values.dtype).index_put((batch.rows,), values)

    fillers = {"noisy": 5, "noisy_is_mask": False, "alpha": 0.5, "uniform": 0.0}
    dense = type(batch)(
        **{
            **batch.__dict__,
            "rows": None,
            "targets": spread(batch.targets, 5),
            "weight": spread(batch.weight, 0.0),
            "sequence": torch.arange(27).repeat_interleave(batch.ids.shape[1]),
            "extra": {key: spread(value, fillers[key]) for key, value in batch.extra.items()},
        }
    )
    results = []
    for b in (batch, dense):
        module.zero_grad()
        loss = module(b)
        loss.backward()
        results.append((loss.detach(), [p.grad.clone() for p in module.parameters()]))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-6, atol=0)
    for a, b in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6 * float(b.abs().max()))


def test_simple_loss_is_t_times_the_bound_weight():
    """The surrogate multiplies the integrand by t and nothing else; the bound stays the bound."""
    clean = toy.clean_batch(toy.SEQUENCES, range(27))
    key = NoiseKey(1, clean.position)
    elbo, simple = objective("masked").corrupt(clean, key), None
    simple = objective("masked", loss="simple").corrupt(clean, key)
    assert torch.equal(elbo.ids, simple.ids)
    assert torch.equal(simple.weight, torch.ones_like(simple.weight))
    from pretrain.noise.time import stratified_time

    t = stratified_time(key, 64)[elbo.sequence]
    torch.testing.assert_close(elbo.weight.double() * t, simple.weight.double())
    bounds = [
        f.bound_batch(clean, key) for f in (objective("masked"), objective("masked", loss="simple"))
    ]
    assert torch.equal(bounds[0].weight, bounds[1].weight)


def test_mask_frequency_follows_t():
    """Masked share of 1e6 tokens within four standard errors of the sum of their t."""
    n, s = 2000, 500
    clean = toy.clean_batch(torch.zeros(n, s, dtype=torch.int64), range(n))
    key = NoiseKey(9, clean.position)
    batch = objective("masked").corrupt(clean, key)
    from pretrain.noise.time import stratified_time

    t = stratified_time(key, 64)
    expected, spread = float(t.sum() * s), math.sqrt(float((t * (1 - t)).sum() * s))
    assert abs(len(batch.rows) - expected) < 4 * spread


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("block", {"block_size": 4}),
        ("block", {"block_size": 20, "clip": (0.3, 0.8)}),
        ("esoteric", {"alpha0": 1.0}),
        ("esoteric", {"alpha0": 0.5, "diffusion_share": 0.25}),
    ],
)
def test_masks_of_the_ordered_families_have_their_frequency(name, fields):
    """1e6 tokens: masks within four standard errors of the sum of their levels, at every level."""
    from pretrain.noise.time import stratified_time, stratified_times

    n, s = 2500, 400
    clean = toy.clean_batch(torch.zeros(n, s, dtype=torch.int64), range(n))
    key = NoiseKey(9, clean.position)
    family = objective(name, **fields)
    batch = family.corrupt(clean, key)
    masked = batch.ids[:, :s] == toy.SPACE.mask_id
    if name == "block":
        size = fields["block_size"]
        low, high = fields.get("clip", (0.0, 1.0))
        t = low + (high - low) * stratified_times(key, 64, s // size)
        p = t.repeat_interleave(size, dim=1)
    else:
        share, alpha0 = fields.get("diffusion_share", 1.0), fields["alpha0"]
        p = (1 - alpha0 * (1 - stratified_time(key, 64)))[:, None].expand(n, s)
        if alpha0 < 1:
            diffusion = stratified_time(key, 64, "phase")[:, None] < share
            p = torch.where(diffusion, p, 1 - alpha0)
    for low in (0.0, 0.25, 0.5, 0.75):
        here = (p >= low) & (p < low + 0.25)
        expected, variance = float(p[here].sum()), float((p * (1 - p))[here].sum())
        assert abs(float(masked[here].sum()) - expected) <= 4 * math.sqrt(variance)
    assert not (batch.ids[:, s:] == toy.SPACE.mask_id).any()


def test_corruption_is_the_same_for_any_split_of_the_batch():
    clean = toy.clean_batch([toy.SEQUENCES[i % 27] for i in range(48)], range(100, 148))
    family = objective("masked")
    whole = family.corrupt(clean, NoiseKey(1, clean.position))
    for size in (1, 5, 16):
        ids = []
        for a in range(0, 48, size):
            part = toy.clean_batch(
                clean.tokens[a : a + size] - toy.FIRST, clean.position[a : a + size]
            )
            ids.append(family.corrupt(part, NoiseKey(1, part.position)).ids)
        assert torch.equal(torch.cat(ids), whole.ids)
