"""Masked diffusion: schedules, estimators, suffix masks, short sequences and static head sizes."""

import itertools
import math

import numpy as np
import pytest
import torch
import toy_language as toy

from pretrain.config.objectives import objectives
from pretrain.noise.key import NoiseKey
from pretrain.noise.time import stratified_time
from pretrain.objectives import build_objective
from pretrain.objectives.base import head_rows

L = toy.L


def objective(name="masked", static_rows=False, **fields):
    config = objectives.make(name=name, time_window=64, **fields)
    return build_objective(config, toy.SPACE, static_rows)


def junk(shown):
    """Conditionals of no distribution: a table that contradicts itself. [L][V]"""
    seed = sum((v + 1) * 5**i for i, v in shown.items())
    return np.random.default_rng(seed).dirichlet(np.ones(toy.V), size=L)


def independent(shown):
    """Marginals, whatever is shown."""
    return np.stack([toy.JOINT.sum(tuple(j for j in range(L) if j != l)) for l in range(L)])


def loss_of(family, batch, table, n, bound=True):
    """Weighted loss of each of n sequences under a table of conditionals."""
    out = torch.full((len(batch.rows), toy.SPACE.vocab_size), -torch.inf, dtype=torch.float64)
    cache = {}
    for i, row in enumerate(batch.rows.tolist()):
        b, l = divmod(row, L)
        ids = tuple(batch.ids[b].tolist())
        if ids not in cache:
            shown = {j: t - toy.FIRST for j, t in enumerate(ids) if t != toy.SPACE.mask_id}
            cache[ids] = torch.from_numpy(np.log(table(shown)))
        out[i, toy.FIRST :] = cache[ids][l]
    score = family.token_bound if bound else family.token_loss
    loss = score(toy.TableChunk(out), batch.targets, batch.extra) * batch.weight.double()
    return torch.zeros(n, dtype=torch.float64).index_add_(0, batch.sequence, loss)


def orders_average(x, table):
    """Mean over all orders of the any-order likelihood."""
    total = 0.0
    for order in itertools.permutations(range(L)):
        for i, l in enumerate(order):
            total -= math.log(table({j: x[j] for j in order[:i]})[l, x[l]]) / math.factorial(L)
    return total


def assert_mean(values, expected):
    error = float(values.std()) / math.sqrt(len(values))
    assert abs(float(values.mean()) - expected) < 4 * error + 1e-12
    return error


@pytest.mark.parametrize("schedule", ["linear", "cosine", "log_linear"])
def test_bernoulli_fixed_count_and_random_order_have_one_expectation(schedule):
    """For conditionals that contradict each other, under every schedule. log-linear leaves a share
    1e-3 of the time out: each token that is scored there counts 1 - 1e-3."""
    family, n, x = objective(schedule=schedule), 12_000, (0, 1, 2)
    clean = toy.clean_batch([x] * n, range(n))
    key = NoiseKey(4, clean.position)
    expected = orders_average(x, junk)
    fixed = assert_mean(loss_of(family, family.bound_batch(clean, key), junk, n), expected)
    bernoulli = assert_mean(loss_of(family, family.corrupt(clean, key), junk, n), expected)
    assert fixed < bernoulli


def test_log_linear_undercounts_independent_tokens_by_its_epsilon():
    """E weight x mask probability is 1 for linear and cosine, exactly 1 - 1e-3 for log-linear."""
    t = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    for name, expected in (("linear", 1.0), ("cosine", 1.0), ("log_linear", 0.999)):
        schedule = objective(schedule=name).schedule
        share = float((schedule.elbo_weight(t) * schedule.noise(t)).mean())
        assert abs(share - expected) < 1e-9


def test_simple_loss_of_independent_tokens_is_half_their_likelihood():
    family, n, x = objective(loss="simple"), 12_000, (0, 1, 2)
    clean = toy.clean_batch([x] * n, range(n))
    nll = -sum(math.log(independent({})[l, x[l]]) for l in range(L))
    batch = family.corrupt(clean, NoiseKey(4, clean.position))
    assert_mean(loss_of(family, batch, independent, n, bound=False), nll / 2)


def test_no_bound_is_a_better_code_than_the_entropy_allows():
    """sum_x exp(-bound(x)) <= 1: the bound never promises more than a distribution can."""
    total = sum(math.exp(-orders_average(x, junk)) for x in toy.SEQUENCES)
    assert total <= 1


def test_ar_ratio_moves_the_same_number_of_masks_to_the_end():
    n, s = 2000, 16
    tokens = torch.zeros(n, s, dtype=torch.int64)
    valid = torch.ones(n, s, dtype=torch.bool)
    valid[::3, 12:] = False
    clean = toy.clean_batch(tokens, range(n), valid)
    key = NoiseKey(1, clean.position)
    plain, moved = objective().corrupt(clean, key), objective(ar_ratio=0.3).corrupt(clean, key)
    masks = [b.ids == toy.SPACE.mask_id for b in (plain, moved)]
    assert torch.equal(masks[0].sum(1), masks[1].sum(1))
    assert not masks[1][~valid].any()
    length, count = valid.sum(1), masks[1].sum(1)
    suffix = (torch.arange(s)[None] >= (length - count)[:, None]) & valid
    is_suffix = (masks[1] == suffix).all(dim=1)
    same = (masks[0] == masks[1]).all(dim=1)
    assert (is_suffix | same).all()
    share = float((~same).double().mean())
    assert 0.2 < share < 0.3 + 4 * math.sqrt(0.21 / n)  # a few suffixes arise by themselves


@pytest.mark.parametrize("name", ["masked", "uniform", "interpolating"])
def test_random_length_shortens_its_share_of_sequences_by_padding(name):
    n, s = 3000, 16
    clean = toy.clean_batch(torch.zeros(n, s, dtype=torch.int64), range(n))
    family = objective(name, random_length=0.2)
    batch = family.corrupt(clean, NoiseKey(1, clean.position))
    length = (batch.ids != toy.SPACE.pad_id).sum(dim=1)
    assert batch.attention.kind == "documents"
    shortened = float((length < s).double().mean())
    expected = 0.2 * (1 - 1 / s)
    assert abs(shortened - expected) < 4 * math.sqrt(expected * (1 - expected) / n)
    counts = np.bincount(length[length < s].numpy(), minlength=s)[1:]
    assert abs(counts - counts.mean()).max() < 4.5 * math.sqrt(counts.mean())
    # Nothing behind the end is scored, and the bound takes whole sequences.
    rows = torch.arange(n * s) if batch.rows is None else batch.rows
    assert (batch.weight[rows % s >= length[rows // s]] == 0).all()
    whole = family.bound_batch(clean, NoiseKey(1, clean.position))
    assert (whole.ids != toy.SPACE.pad_id).all()


@pytest.mark.parametrize(
    ("name", "fields"),
    [("masked", {}), ("uniform", {"loss": "simple"}), ("block", {}), ("esoteric", {}),
     ("interpolating", {"noise": "masked"}), ("interpolating", {"loss": "cross_entropy"})],
)  # fmt: skip
@pytest.mark.parametrize("method", ["corrupt", "bound_batch"])
@pytest.mark.parametrize("batches", [20, pytest.param(40, marks=pytest.mark.slow)])
def test_static_head_sizes_are_few_and_change_no_number(name, fields, method, batches):
    """At most eight sizes, everything that is scored is in, and the rest weighs nothing."""
    sizes = set()
    for start in range(batches):
        clean = toy.clean_batch([toy.SEQUENCES[start % 27]] * 8, range(8 * start, 8 * start + 8))
        key = NoiseKey(1, clean.position)
        exact = getattr(objective(name, **fields), method)(clean, key)
        static = getattr(objective(name, True, **fields), method)(clean, key)
        real = len(exact.targets)
        for field in ("targets", "weight", "sequence", "rows"):
            a, b = getattr(exact, field), getattr(static, field)
            if a is None:
                assert b is None
            elif float(exact.weight.abs().sum()) > 0:
                assert torch.equal(a, b[:real]), field
        assert (static.weight[real:] == 0).all()
        assert (static.targets[real:] == toy.SPACE.doc_id).all()
        assert all(len(v) == len(static.targets) for v in static.extra.values())
        sizes.add(len(static.targets))
    assert len(sizes) <= 8


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("autoregressive", {}),
        ("masked", {}),
        ("masked", {"schedule": "cosine"}),
        ("masked", {"schedule": "log_linear", "ar_ratio": 0.5}),
        ("uniform", {"loss": "simple", "schedule": "cosine"}),
        ("uniform", {}),
        ("interpolating", {"noise": "masked"}),
        ("interpolating", {"noise": "hybrid", "uniform_share": 0.0}),
        ("interpolating", {"noise": "hybrid", "loss": "cross_entropy"}),
        ("interpolating", {"loss": "cross_entropy"}),
        ("block", {"clip": (0.3, 0.8)}),
        ("esoteric", {"alpha0": 0.5, "diffusion_share": 0.25}),
        ("esoteric", {"alpha0": 1.0}),
    ],
)
def test_operations_count_the_head_rows_that_are_drawn(name, fields):
    """`head_share`, from which FLOPs and plans follow, is the share of tokens that are scored."""
    clean = toy.clean_batch(torch.zeros(1024, 24, dtype=torch.int64), range(1024))
    family = objective(name, **fields)
    scored = len(family.corrupt(clean, NoiseKey(1, clean.position)).targets)
    assert abs(scored / clean.tokens.numel() - family.head_share) < 0.015


def test_a_batch_without_any_noise_still_has_a_row():
    for static in (False, True):
        rows = head_rows(torch.zeros(2, 12, dtype=torch.bool), static)
        assert len(rows.index) >= 1 and not rows.real.any()


FAMILIES = [
    ("autoregressive", {"orders": 4}),
    ("autoregressive", {"hide": "queries"}),
    ("masked", {"ar_ratio": 0.5, "random_length": 0.5, "schedule": "cosine"}),
    ("uniform", {}),
    ("uniform", {"loss": "simple"}),
    ("uniform", {"curriculum_sequences": 10**6, "curriculum_temperature": (0.3, 0.1)}),
    ("interpolating", {"independent_levels": 0.5}),
    ("interpolating", {"noise": "hybrid"}),
    ("interpolating", {"loss": "cross_entropy"}),
    ("block", {"block_size": 2}),
    ("block", {"block_size": 3, "clip": (0.3, 0.8), "clip_masks": True}),
    ("esoteric", {"alpha0": 0.5}),
    ("esoteric", {"alpha0": 1.0}),
    ("distillation", {"round_sequences": 32, "first_gap": 0.25}),
]


@pytest.mark.parametrize(("name", "fields"), FAMILIES, ids=str)
@pytest.mark.parametrize("method", ["corrupt", "bound_batch"])
@pytest.mark.parametrize("rows", [24, pytest.param(48, marks=pytest.mark.slow)])
def test_noise_is_the_same_for_any_split_of_the_batch(name, fields, method, rows):
    """Rank, micro-batch and resume only choose which positions are drawn, never what."""
    family = objective(name, **fields)
    tokens = torch.tensor([toy.SEQUENCES[i % 27] for i in range(rows)]).repeat(1, 4)

    def batch(a, b):
        clean = toy.clean_batch(tokens[a:b], range(100 + a, 100 + b))
        return getattr(family, method)(clean, NoiseKey(1, clean.position))

    whole = batch(0, rows)
    columns = whole.attention.columns
    for size in (1, 7, 16):
        parts = [batch(a, min(a + size, rows)) for a in range(0, rows, size)]
        assert torch.equal(torch.cat([p.ids for p in parts]), whole.ids)
        if whole.mix is not None:
            assert torch.equal(torch.cat([p.mix for p in parts]), whole.mix)
        for field, values in whole.teacher.items():
            assert torch.equal(torch.cat([p.teacher[field] for p in parts]), values)
        if columns is not None and all(p.attention.columns is not None for p in parts):
            together = torch.cat([p.attention.columns for p in parts], dim=1)
            assert torch.equal(together, columns)
        scored = [p.weight[p.weight > 0] for p in parts]
        assert torch.equal(torch.cat(scored), whole.weight[whole.weight > 0])
        if whole.noise_level is not None:
            assert torch.equal(torch.cat([p.noise_level for p in parts]), whole.noise_level)


def test_time_conditioned_families_are_given_minus_log_alpha():
    clean = toy.clean_batch([(0, 1, 2)] * 64, range(64))
    key = NoiseKey(1, clean.position)
    for loss in ("elbo", "simple"):
        level = objective("uniform", loss=loss).corrupt(clean, key).noise_level
        expected = -torch.log1p(-stratified_time(key, 64)).float()
        torch.testing.assert_close(level, expected)


def test_losses_that_a_family_lacks_are_refused():
    for name in ("masked", "uniform", "block", "esoteric", "autoregressive"):
        with pytest.raises(ValueError, match="loss"):
            objective(name, loss="dynamic")
    with pytest.raises(ValueError, match="alpha0=1"):
        objective("esoteric", alpha0=0.5, loss="simple")


def test_every_packaged_objective_builds():
    from pretrain.config.compose import compose
    from pretrain.config.groups import CONFIG_ROOT

    names = [p.stem for p in (CONFIG_ROOT / "objective").glob("*.yaml")]
    assert len(names) >= 10
    for name in names:
        config = compose([f"objective={name}", "model=tiny", "data.train=a", "data.validation=b",
                          "data.tokenizer=c"])  # fmt: skip
        assert build_objective(config.objective, toy.SPACE).name == config.objective.name


def test_draws_of_a_sequence_share_out_the_noise_levels():
    """As many stratified draws as tokens mask every count exactly once; the mean of the draws has
    the same expectation and a fraction of the variance."""
    family, n, x = objective(), 3000, (0, 1, 2)
    clean = toy.clean_batch([x] * n, range(n))
    expected = orders_average(x, junk)
    means, spread = [], []
    for parts in (1, L):
        draws, counts = [], []
        for d in range(L):
            key = NoiseKey(4, clean.position, attempt=d, stratum=(d % parts, parts))
            batch = family.bound_batch(clean, key)
            counts.append((batch.ids == toy.SPACE.mask_id).sum(dim=1))
            draws.append(loss_of(family, batch, junk, n))
        mean = torch.stack(draws).mean(dim=0)
        means.append(assert_mean(mean, expected))
        spread.append(float(mean.var()))
        if parts == L:
            assert torch.equal(torch.stack(counts), torch.arange(1, L + 1)[:, None].expand(L, n))
    assert spread[1] < 0.7 * spread[0]
