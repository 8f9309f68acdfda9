"""Models with short convolutions in other layouts: the same run as on one rank."""

from __future__ import annotations

import pytest
from layouts import CONVOLVED_TASKS, Cut
from test_layout_invariance import check

CUTS = [
    Cut(tp=2),
    Cut(pp=2, zero=1),
    Cut(dp=2, zero=3, recompute="selective"),
    Cut(tp=2, recompute="full"),
]
FURTHER = [
    Cut(tp=2, pp=2, zero=1, recompute="selective"),
    Cut(tp=2, dp=2, zero=2),
    Cut(dp=2, zero=3, recompute="full"),
]


@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_convolutions_are_the_same_in_every_layout(cut) -> None:
    """The two kinds of kernel in turn; one row of each batch ends early."""
    check(cut, list(CONVOLVED_TASKS)[CUTS.index(cut) % 2])


@pytest.mark.slow
@pytest.mark.parametrize("task", CONVOLVED_TASKS)
@pytest.mark.parametrize("cut", CUTS + FURTHER, ids=str)
def test_both_kinds_in_further_layouts(cut, task) -> None:
    check(cut, task)
