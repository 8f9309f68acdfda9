"""bfloat16 with float32 accumulation in every kind of layout: one rank's float32 curve, rounded."""

from __future__ import annotations

import pytest
from layouts import LONG, STEPS, Layout, beside_one_rank

SLOW = pytest.mark.slow
LAYOUTS = [
    pytest.param(Layout(zero=1, precision="bfloat16"), LONG, marks=SLOW),
    pytest.param(Layout(tp=2, zero=1, precision="bfloat16"), LONG, marks=SLOW),
    pytest.param(Layout(pp=2, zero=1, precision="bfloat16"), LONG, marks=SLOW),
    (Layout(dp=2, zero=3, precision="bfloat16"), STEPS),
    pytest.param(Layout(tp=2, dp=2, zero=2, precision="bfloat16"), LONG, marks=SLOW),
    pytest.param(Layout(pp=2, tp=2, zero=1, precision="bfloat16"), LONG, marks=SLOW),
]


@pytest.mark.parametrize(("layout", "steps"), LAYOUTS, ids=str)
def test_the_curve_is_that_of_float32_within_rounding(layout, steps) -> None:
    results, reference = beside_one_rank(layout, "masked", steps)
    for got in results:
        for (loss, norm), (want, want_norm) in zip(got["curve"], reference["curve"], strict=True):
            assert loss == pytest.approx(want, rel=1e-2)
            assert norm == pytest.approx(want_norm, rel=1e-1)
        for name, end in got["end"].items():
            # DeepSpeed takes its float32 weights from the bfloat16 ones that the model starts with.
            start = reference["start"][name].bfloat16().float()
            assert got["start"][name].equal(start), name
            moved = (reference["end"][name] - reference["start"][name]).norm()
            assert (end - reference["end"][name]).norm() <= 0.3 * moved, name
