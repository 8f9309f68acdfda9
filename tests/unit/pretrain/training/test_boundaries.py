"""Ends of steps: one checkpoint for each place, at the last step that ends by then."""

from __future__ import annotations

from fractions import Fraction

import pytest

from pretrain.config.optimizers import ScheduleConfig
from pretrain.training.boundaries import is_last_before, last_boundary, position_at
from pretrain.training.learning_rate import decay_start


@pytest.mark.parametrize("batch", [1, 4, 7, 16])
@pytest.mark.parametrize("total", [1, 30, 47, 118])
def test_each_place_has_one_step(batch: int, total: int) -> None:
    """It is the last one that ends at or before the place; a place before the first step none."""
    ends = [*range(batch, total, batch), total]
    for place in range(total + 1):
        found = [
            end
            for end in ends
            if is_last_before(end, [place], batch_size=batch, total_positions=total)
        ]
        assert found == [end for end in ends if end <= place][-1:]
        assert place == total or sum(found) == last_boundary(place, batch)


def test_a_place_beyond_the_run_is_not_its_end() -> None:
    assert not is_last_before(40, [41], batch_size=8, total_positions=40)


@pytest.mark.parametrize("sequences", [1, 7, 47, 1000, 8191, 10**7])
def test_epochs_of_positions_lead_back_to_them(sequences: int) -> None:
    for position in {1, 3, sequences // 3, sequences, 7 * sequences + 1, 801 * sequences}:
        assert position_at(position / sequences, sequences) == position
    assert position_at(0.8, 47) == 37  # 37.6: the place before, never the one after


@pytest.mark.parametrize("decay", [0.1, 0.2, 0.25, 0.3, 1 / 3])
def test_the_step_before_a_decay_has_the_full_rate(decay: float) -> None:
    """In exact numbers too: rounding never moves the boundary past the start of the decay."""
    schedule = ScheduleConfig(name="wsd", decay=decay)
    for total in range(1, 400):
        start = decay_start(schedule, total_positions=total, warmup=0)
        found = last_boundary(start, 4)
        assert found <= start < found + 4
        assert found <= (1 - Fraction(decay)) * total + Fraction(1, 10**9)
