"""Schedules: their ends, continuity, and that progress is counted in positions."""

from __future__ import annotations

import itertools

import pytest

from pretrain.config.optimizers import AdamWConfig, ScheduleConfig
from pretrain.training.learning_rate import learning_rate

TOTAL, BATCH = 1000, 10


def rates(batch=BATCH, **schedule):
    config = AdamWConfig(lr=1.0, min_lr=0.1, schedule=ScheduleConfig(**schedule))
    return [
        learning_rate(config, position=p, total_positions=TOTAL, batch_size=batch)
        for p in range(batch, TOTAL + 1, batch)
    ]


@pytest.mark.parametrize("warmup", [0.1, 10])
@pytest.mark.parametrize("name", ["constant", "cosine", "wsd"])
def test_warm_up_is_linear_and_peaks_at_its_end(name, warmup):
    values = rates(name=name, warmup=warmup)
    assert values[:9] == pytest.approx([0.1 * i for i in range(1, 10)])
    assert values[9] == pytest.approx(1.0)
    assert max(values) == pytest.approx(1.0)


def test_cosine_ends_at_the_minimum_and_passes_the_middle_halfway():
    values = rates(name="cosine", warmup=0)
    assert values[-1] == pytest.approx(0.1)
    assert values[49] == pytest.approx(0.55)
    assert all(a >= b for a, b in itertools.pairwise(values))


def test_wsd_is_constant_then_falls_linearly_to_the_minimum():
    values = rates(name="wsd", warmup=0.05, decay=0.2)
    assert values[5:80] == pytest.approx([1.0] * 75)
    assert values[-1] == pytest.approx(0.1)
    assert values[89] == pytest.approx(0.55)


def test_constant_stays():
    assert rates(name="constant", warmup=0) == [1.0] * 100


def test_a_changed_batch_size_keeps_the_rate_at_every_position():
    fine = rates(name="cosine", warmup=0.1)
    coarse = rates(batch=50, name="cosine", warmup=0.1)
    assert coarse == pytest.approx(fine[4::5])
