"""Stratified noise levels: one a stratum and window, whatever the batch or rank."""

import numpy as np
import torch

from pretrain.noise.key import NoiseKey
from pretrain.noise.time import spread_time, stratified_time, stratified_times


def test_each_window_hits_each_stratum_once_in_a_new_order():
    window = 32
    t = stratified_time(NoiseKey(1, torch.arange(40 * window)), window)
    strata = (t * window).long().view(40, window)
    assert torch.equal(strata.sort(dim=1).values, torch.arange(window).expand(40, window))
    assert len({tuple(row.tolist()) for row in strata}) == 40


def test_time_belongs_to_the_position():
    whole = stratified_time(NoiseKey(1, torch.arange(96)), 24)
    for size in (1, 7, 30):
        pieces = [
            stratified_time(NoiseKey(1, torch.arange(a, min(a + size, 96))), 24)
            for a in range(0, 96, size)
        ]
        assert torch.equal(torch.cat(pieces), whole)


def test_no_rank_is_tied_to_a_noise_band():
    """Rank r of 4 takes a fixed slice of every batch; its times must be uniform on (0, 1) all the
    same. Cutting the sorted strata in order, as public code does, fails this at once."""
    batch, steps = 16, 1000
    t = stratified_time(NoiseKey(5, torch.arange(batch * steps)), batch).view(steps, 4, 4)
    for rank in range(4):
        counts = np.bincount((t[:, rank].flatten() * 20).long().numpy(), minlength=20)
        chi2 = ((counts - 200) ** 2 / 200).sum()
        assert chi2 < 19 + 5 * np.sqrt(38)


def test_variance_of_a_batch_mean_falls_by_stratifying():
    t = stratified_time(NoiseKey(2, torch.arange(64 * 500)), 64).view(500, 64)
    independent = 1 / 12 / 64
    assert t.mean(dim=1).var() < independent / 50


def test_times_of_blocks_hit_every_stratum_of_the_window_once():
    window, count = 8, 5
    t = stratified_times(NoiseKey(1, torch.arange(40 * window)), window, count)
    strata = (t * window * count).long().view(40, window * count).sort(dim=1).values
    assert torch.equal(strata, torch.arange(window * count).expand(40, -1))
    # Each place has uniform times of its own: no block is tied to a noise band.
    for place in range(count):
        counts = np.bincount((t[:, place] * 10).long().numpy(), minlength=10)
        assert ((counts - 32) ** 2 / 32).sum() < 9 + 5 * np.sqrt(18)


def test_spread_time_keeps_integrals():
    u = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    for power in (1.0, 2.0, 3.0):
        t, jacobian = spread_time(u, power)
        for f, expected in ((torch.cos, np.sin(1.0)), (torch.exp, np.e - 1)):
            assert abs(float((f(t) * jacobian).mean()) - expected) < 1e-8
