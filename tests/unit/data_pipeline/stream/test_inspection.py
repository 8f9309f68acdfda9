"""The positions of a step come from the run's log, whatever batch sizes the run has had."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.errors import DataError
from data_pipeline.stream.inspection import step_positions

Row = dict[str, float]


def row(step: int, start: int, stop: int) -> Row:
    return {"step": step, "position_start": start, "position_stop": stop}


@given(
    parts=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 12)), min_size=1, max_size=6),
    missing=st.integers(0, 11),
)
def test_every_logged_step_is_found_for_any_batch_sizes(
    parts: list[tuple[int, int]], missing: int
) -> None:
    """Intervals of (steps, batch size); the run's very last step lacks some positions."""
    sizes = [batch for steps, batch in parts for _ in range(steps)]
    present = parts[-1][1]
    sizes[-1] -= missing % present
    edges = [0, *np.cumsum(sizes).tolist()]
    ends = [0, *np.cumsum([steps for steps, _ in parts]).tolist()]
    rows = [row(last, edges[first], edges[last]) for first, last in pairwise(ends)]
    rows.insert(1, {"step": rows[0]["step"], "validation/nats_per_token": 1.0})
    for step in range(1, len(sizes) + 1):
        found = step_positions(rows, step, present, edges[-1])
        assert (found.start, found.stop, found.logged) == (edges[step - 1], edges[step], True)
    with pytest.raises(DataError, match=f"ends with step {len(sizes)}$"):
        step_positions(rows, len(sizes) + 1, present, edges[-1])


def test_steps_never_run_are_projected_and_say_so() -> None:
    rows = [row(10, 0, 80), row(15, 80, 160)]
    found = step_positions(rows, 18, 24, 240)
    assert (found.start, found.stop, found.logged) == (208, 232, False)
    assert "ends with step 15 at position 160" in found.basis
    assert "present global batch size of 24" in found.basis
    assert step_positions(rows, 19, 24, 240).stop == 240
    with pytest.raises(DataError, match="ends with step 19"):
        step_positions(rows, 20, 24, 240)
    assert step_positions([], 3, 8, 100).start == 16
    with pytest.raises(DataError, match="count from 1"):
        step_positions(rows, 0, 24, 240)


def test_a_lengthened_run_keeps_its_short_step_in_the_middle() -> None:
    rows = [row(3, 0, 20), row(5, 20, 36)]
    steps = [step_positions(rows, step, 8, 36) for step in range(1, 6)]
    edges = [(p.start, p.stop) for p in steps]
    assert edges == [(0, 8), (8, 16), (16, 20), (20, 28), (28, 36)]


def test_a_branch_knows_its_own_steps_only() -> None:
    rows = [row(110, 1200, 1240), row(120, 1240, 1320)]
    assert step_positions(rows, 106, 8, 2000).start == 1200
    assert step_positions(rows, 111, 8, 2000).start == 1240
    with pytest.raises(DataError, match="begins at position 1,200 with step 106"):
        step_positions(rows, 105, 8, 2000)


@pytest.mark.parametrize("rows", [[row(10, 0, 83)], [row(5, 0, 40), row(10, 60, 100)]])
def test_a_log_that_does_not_add_up_is_refused(rows: list[Row]) -> None:
    with pytest.raises(DataError, match="verify --visits"):
        step_positions(rows, 7, 8, 1000)
