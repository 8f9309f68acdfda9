"""CompleteP in other layouts: the same run as on one rank, since a name decides a multiplier."""

from __future__ import annotations

import pytest
from layouts import COMPLETE_P_TASKS, Layout
from test_layout_invariance import check

LAYOUTS = [
    Layout(tp=2, sp=True),
    Layout(pp=2, zero=1),
    Layout(dp=2, zero=3, recompute="selective"),
    Layout(cp=2, recompute="full"),
]
FURTHER = [
    Layout(tp=2),
    Layout(dp=2, zero=1),
    Layout(tp=2, pp=2, zero=1, recompute="selective"),
    Layout(tp=2, dp=2, zero=2),
    Layout(dp=2, zero=3, recompute="full"),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_multipliers_are_the_same_in_every_layout(layout) -> None:
    """The tasks in turn."""
    check(layout, list(COMPLETE_P_TASKS)[LAYOUTS.index(layout) % len(COMPLETE_P_TASKS)])


@pytest.mark.slow
@pytest.mark.parametrize("task", COMPLETE_P_TASKS)
@pytest.mark.parametrize("layout", LAYOUTS + FURTHER, ids=str)
def test_every_task_in_every_layout(layout, task) -> None:
    check(layout, task)
