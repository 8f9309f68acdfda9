"""Models with short convolutions in other layouts: the same run as on one rank."""

from __future__ import annotations

import pytest
from layouts import CONVOLVED_TASKS, Layout
from test_layout_invariance import check

LAYOUTS = [
    Layout(tp=2),
    Layout(pp=2, zero=1),
    Layout(dp=2, zero=3, recompute="selective"),
    Layout(tp=2, recompute="full"),
]
FURTHER = [
    Layout(tp=2, pp=2, zero=1, recompute="selective"),
    Layout(tp=2, dp=2, zero=2),
    Layout(dp=2, zero=3, recompute="full"),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_convolutions_are_the_same_in_every_layout(layout) -> None:
    """The two kinds of kernel in turn; one row of each batch ends early."""
    check(layout, list(CONVOLVED_TASKS)[LAYOUTS.index(layout) % 2])


@pytest.mark.slow
@pytest.mark.parametrize("task", CONVOLVED_TASKS)
@pytest.mark.parametrize("layout", LAYOUTS + FURTHER, ids=str)
def test_both_kinds_in_further_layouts(layout, task) -> None:
    check(layout, task)
