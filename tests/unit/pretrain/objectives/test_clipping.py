"""The interval of noise levels chosen from measured variance."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import toy_language as toy

from pretrain.config.objectives import objectives
from pretrain.errors import ConfigError
from pretrain.noise.key import NoiseKey
from pretrain.noise.time import stratified_times
from pretrain.objectives import build_objective
from pretrain.objectives.clipping import (
    best_interval,
    candidate_intervals,
    draw_counts,
    interval_sums,
)


def test_candidates_are_the_published_grid():
    intervals = candidate_intervals()
    assert len(intervals) == len(set(intervals)) == 36
    assert (0.45, 0.95) in intervals and (0.3, 0.8) in intervals and (0.0, 1.0) in intervals
    for low, high in intervals:
        assert 0 <= low < high <= 1 and high - low >= 0.5 - 1e-12


def test_sums_over_ranks_choose_what_a_direct_computation_does():
    rng = np.random.default_rng(0)
    t, noise = rng.uniform(size=4000), rng.normal(size=4000)
    loss = 2 + noise * (0.1 + abs(t - 0.6))
    sums = sum(
        interval_sums(torch.from_numpy(t[i::3]), torch.from_numpy(loss[i::3])) for i in range(3)
    )
    variances = {
        (low, high): loss[(t >= low) & (t <= high)].var(ddof=1)
        for low, high in candidate_intervals()
    }
    assert best_interval(sums) == min(variances, key=variances.get)
    assert best_interval(sums) == pytest.approx((0.35, 0.85), abs=0.051)


def test_of_equal_intervals_the_widest_is_taken():
    t = torch.linspace(0.001, 0.999, 200, dtype=torch.float64)
    assert best_interval(interval_sums(t, torch.ones_like(t))) == (0.0, 1.0)


def test_block_diffusion_measures_and_moves_and_remembers():
    """Cross-entropy 1 everywhere: the loss of a block is its masked share over t, whose variance
    (1 - t) / (t |b|) is smallest in the highest interval."""
    config = objectives.make(name="block", block_size=4, adapt_clip=True, time_window=64)
    family = build_objective(config, toy.SPACE)
    clean = toy.clean_batch(torch.zeros(3000, 12, dtype=torch.int64), range(3000))

    def score(batch):
        out = torch.zeros(len(batch.ids), dtype=torch.float64)
        return out.index_add_(0, batch.sequence, batch.weight)

    sums = family.measure(clean, NoiseKey(1, clean.position), score)
    assert float(sums[-1, 0]) == 3000  # one block of each sequence, all levels
    assert abs(float(sums[-1, 1]) / 3000 - 1) < 0.1
    for (low, high), (count, total, squares) in zip(
        candidate_intervals(), sums.tolist(), strict=True
    ):
        if low > 0.2:
            expected = np.mean([(1 - t) / (4 * t) for t in np.linspace(low, high, 1000)])
            assert squares / count - (total / count) ** 2 == pytest.approx(expected, rel=0.2)
    family.adapt(sums)
    assert family.interval == (0.5, 1.0)
    weight = family.corrupt(clean, NoiseKey(1, clean.position)).weight
    assert float(weight[weight > 0].max()) <= 2
    other = build_objective(config, toy.SPACE)
    other.restore(family.state)
    assert other.interval == family.interval
    # The bound knows nothing of it.
    bounds = [
        f.bound_batch(clean, NoiseKey(1, clean.position))
        for f in (family, build_objective(config, toy.SPACE))
    ]
    assert torch.equal(bounds[0].weight, bounds[1].weight)
    assert torch.equal(bounds[0].ids, bounds[1].ids)


def redrawn(size, t, low, high):
    """Law of the number of masks among `size` tokens, drawn until its share is inside."""
    law = np.array([math.comb(size, m) * t**m * (1 - t) ** (size - m) for m in range(size + 1)])
    law[[not round(low * 1e6) <= round(m / size * 1e6) <= round(high * 1e6)
         for m in range(size + 1)]] = 0  # fmt: skip
    return law / law.sum()


@pytest.mark.parametrize(
    ("size", "t", "interval"),
    [(4, 0.7, (0.45, 0.95)), (20, 0.36, (0.35, 0.85)), (3, 0.2, (0.0, 1.0)), (1, 0.9, (0.5, 1.0))],
)
def test_counts_have_the_law_of_masks_drawn_until_their_share_is_inside(size, t, interval):
    n = 20_000
    u = (torch.arange(n, dtype=torch.float64) + 0.5) / n  # all quantiles: no sampling error
    full = torch.full((n,), float(size), dtype=torch.float64)
    number = draw_counts(full, torch.full_like(full, t), interval, u)
    counts = np.bincount(number.long().numpy(), minlength=size + 1) / n
    np.testing.assert_allclose(counts, redrawn(size, t, *interval), atol=1.01 / n)


def test_clipped_masks_stay_inside_fall_anywhere_and_keep_their_weight():
    """Every whole block's share lies in the interval and each of its sets of masks is as likely as
    another of that size; an incomplete block, in which no share could, is masked as always."""
    fields = {"name": "block", "block_size": 4, "clip": (0.45, 0.8), "time_window": 64}
    clipped = build_objective(objectives.make(clip_masks=True, **fields), toy.SPACE)
    n = 6000
    valid = torch.ones(n, 10, dtype=torch.bool)
    valid[:, 9] = False  # blocks of 4, 4 and 1 tokens
    clean = toy.clean_batch(torch.zeros(n, 10, dtype=torch.int64), range(n), valid)
    key = NoiseKey(1, clean.position)
    batch = clipped.corrupt(clean, key)
    masked = (batch.ids[:, :10] == toy.SPACE.mask_id).double()
    t = 0.45 + 0.35 * stratified_times(key, 64, 3)
    for b in range(2):
        own = masked[:, 4 * b : 4 * b + 4]
        number = own.sum(dim=1)
        assert set(number.tolist()) == {2.0, 3.0}
        expected = np.mean([redrawn(4, float(x), 0.45, 0.8)[3] for x in t[:, b]])
        error = math.sqrt(expected * (1 - expected) / n)
        assert abs(float((number == 3).double().mean()) - expected) < 4 * error
        patterns = own[number == 2] @ torch.tensor([1.0, 2.0, 4.0, 8.0], dtype=torch.float64)
        each = np.bincount(patterns.long().numpy(), minlength=16)
        each = each[each > 0] / each.sum()
        assert len(each) == 6 and abs(each - 1 / 6).max() < 4 * math.sqrt(5 / 36 / len(patterns))
    share = float(masked[:, 8].mean())
    assert abs(share - float(t[:, 2].mean())) < 4 * 0.5 / math.sqrt(n) and not masked[:, 9].any()
    block = (batch.rows % 20) // 4
    torch.testing.assert_close(batch.weight, (1 / t[batch.sequence, block]).float())
    # The bound knows nothing of it, and a part of the batch is the same part of its masks.
    plain = build_objective(objectives.make(**fields), toy.SPACE)
    bounds = [f.bound_batch(clean, key) for f in (clipped, plain)]
    assert torch.equal(bounds[0].ids, bounds[1].ids)
    part = replace(
        clean, tokens=clean.tokens[5:9], position=clean.position[5:9],
        segment=clean.segment[5:9], valid=valid[5:9],
    )  # fmt: skip
    assert torch.equal(clipped.corrupt(part, key.at(part.position)).ids, batch.ids[5:9])


def test_the_variance_of_clipped_masks_is_measured_as_they_will_be_drawn():
    """Cross-entropy 1 everywhere: a block's loss is its masked share over t, whose moments under
    the law cut off at both ends are known for every interval."""
    config = objectives.make(
        name="block", block_size=4, adapt_clip=True, clip_masks=True, time_window=64
    )
    family = build_objective(config, toy.SPACE)
    n = 6000
    clean = toy.clean_batch(torch.zeros(n, 8, dtype=torch.int64), range(n))

    def score(batch):
        out = torch.zeros(len(batch.ids), dtype=torch.float64)
        return out.index_add_(0, batch.sequence, batch.weight)

    sums = family.measure(clean, NoiseKey(1, clean.position), score)
    for (low, high), (count, total, squares) in zip(
        candidate_intervals(), sums.tolist(), strict=True
    ):
        if low < 0.2:
            continue
        assert count == pytest.approx(n * (high - low), rel=0.1)
        levels = np.linspace(low, high, 201)
        laws = np.array([redrawn(4, t, low, high) for t in levels])
        share = np.arange(5) / 4 / levels[:, None]
        mean = (laws * share).sum(axis=1).mean()
        variance = (laws * share**2).sum(axis=1).mean() - mean**2
        assert total / count == pytest.approx(mean, rel=0.05)
        assert squares / count - (total / count) ** 2 == pytest.approx(variance, rel=0.2)
    family.adapt(sums)
    assert family.interval != (0.0, 1.0)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"block_size": 1, "clip": (0.3, 0.8)}, r"block_size 1 tokens is a share in \[0.3, 0.8\]"),
        ({"block_size": 4, "clip": (0.55, 0.7)}, "widen objective.clip"),
        ({"block_size": 1, "clip": (1.0, 1.0), "adapt_clip": True}, "adapt_clip"),
    ],
)
def test_shares_that_no_number_of_masks_has_are_refused(fields, match):
    with pytest.raises(ConfigError, match=match):
        build_objective(objectives.make(name="block", clip_masks=True, **fields), toy.SPACE)
    build_objective(objectives.make(name="block", **fields), toy.SPACE)
