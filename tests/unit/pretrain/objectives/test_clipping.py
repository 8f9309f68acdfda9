"""The interval of noise levels chosen from measured variance."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from pretrain.config import ObjectiveConfig
from pretrain.noise.key import NoiseKey
from pretrain.objectives import build_objective
from pretrain.objectives.clipping import best_interval, candidate_intervals, interval_sums

_spec = importlib.util.spec_from_file_location("toy", Path(__file__).with_name("toy.py"))
toy = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(toy)


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
    config = ObjectiveConfig(name="block", block_size=4, adapt_clip=True, time_window=64)
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
