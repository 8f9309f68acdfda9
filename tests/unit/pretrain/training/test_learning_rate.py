"""Schedules: their ends, continuity, and that progress is counted in positions."""

from __future__ import annotations

import itertools

import pytest

from pretrain.config.compose import compose, flatten
from pretrain.config.optimizers import AdamWConfig, ScheduleConfig
from pretrain.errors import ConfigError
from pretrain.training.learning_rate import (
    check_warmup,
    learning_rate,
    resumed_warmup,
    warmup_positions,
)

TOTAL, BATCH = 1000, 10


def rates(batch=BATCH, **schedule):
    config = AdamWConfig(lr=1.0, min_lr=0.1, schedule=ScheduleConfig(**schedule))
    warmup = warmup_positions(config.schedule, total_positions=TOTAL, batch_size=batch)
    return [
        learning_rate(config, position=p, total_positions=TOTAL, warmup=warmup)
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


def composed(*overrides):
    paths = ("data.train=t.json", "data.validation=v.json", "data.tokenizer=t.model")
    return compose([*paths, *overrides])


def saved(config, warmup=None):
    """State of a checkpoint; without `warmup` that of an earlier version."""
    state = {"config": flatten(config)}
    return state if warmup is None else state | {"schedule": {"warmup_positions": warmup}}


@pytest.mark.parametrize(("warmup", "positions"), [("10", 40.0), ("0.1", 20.0)])
@pytest.mark.parametrize("recorded", [True, False])
def test_a_resumed_run_keeps_the_warm_up_of_its_first_start(warmup, positions, recorded):
    """Whatever becomes of batch size and epochs, also after a second change."""
    first = composed(f"optimizer.schedule.warmup={warmup}", "train.global_batch_size=4")
    state = saved(first, positions if recorded else None)
    for change in ("train.global_batch_size=16", "data.epochs=10"):
        later = composed(f"optimizer.schedule.warmup={warmup}", "train.global_batch_size=4", change)
        assert resumed_warmup(state, later, sequences_per_epoch=200) == positions
        again = saved(later, resumed_warmup(state, later, sequences_per_epoch=200))
        assert resumed_warmup(again, first, sequences_per_epoch=200) == positions


def test_another_warm_up_on_resume_is_computed_anew():
    first = composed("optimizer.schedule.warmup=10", "train.global_batch_size=4")
    steps = composed("optimizer.schedule.warmup=5", "train.global_batch_size=16")
    share = composed("optimizer.schedule.warmup=0.1", "data.epochs=3")
    assert resumed_warmup(saved(first, 40.0), steps, sequences_per_epoch=200) == 80.0
    assert resumed_warmup(saved(first, 40.0), share, sequences_per_epoch=200) == pytest.approx(60)


def test_a_warm_up_longer_than_the_run_is_refused_with_both_numbers():
    steps = ScheduleConfig(warmup=64)
    check_warmup(ScheduleConfig(warmup=63), total_positions=1000, batch_size=16)  # 62.5 steps
    check_warmup(ScheduleConfig(warmup=0.9), total_positions=1, batch_size=16)
    with pytest.raises(ConfigError, match=r"warmup 64 steps .* run of 63 steps \(1,000 sequences"):
        check_warmup(steps, total_positions=1000, batch_size=16)
    shortened = composed("optimizer.schedule.warmup=10", "data.epochs=0.1")
    before = saved(composed("optimizer.schedule.warmup=10"), 40.0)
    with pytest.raises(ConfigError, match=r"warm-up .* 40 sequences .* ends after 20"):
        resumed_warmup(before, shortened, sequences_per_epoch=200)
    # A run that an earlier version began with too long a warm-up goes on.
    same = composed("optimizer.schedule.warmup=10")
    assert resumed_warmup(saved(same, 4000.0), same, sequences_per_epoch=200) == 4000.0
