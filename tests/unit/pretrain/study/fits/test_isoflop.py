"""Approaches 1 and 2 against the optimum of the law that the losses follow."""

import numpy as np
import pandas as pd
import pytest

from pretrain.errors import ConfigError
from pretrain.study.fits.isoflop import envelope, parabolas
from pretrain.study.fits.published import published_law

LAW = published_law("besiroglu")
EXPONENT = LAW.values["beta"] / (LAW.values["alpha"] + LAW.values["beta"])


def isoflops(budgets=(1e18, 1e19, 1e20, 1e21), width=1.2):
    """Sizes around the optimum of each budget."""
    rows = []
    for flops in budgets:
        best = 0.05 * flops**EXPONENT
        for size in best * np.exp(np.linspace(-width, width, 9)):
            tokens = flops / (6 * size)
            rows.append((flops, size, float(LAW.loss(size, tokens, tokens))))
    return pd.DataFrame(rows, columns=["flops", "params", "loss"])


def test_parabolas_find_the_exponent_of_the_law():
    found = parabolas(isoflops())
    assert found.params.exponent == pytest.approx(EXPONENT, abs=0.01)
    assert found.params.exponent + found.tokens.exponent == pytest.approx(1)
    flops = 1e20
    product = 6 * found.params(flops) * found.tokens(flops)
    assert product == pytest.approx(flops)
    assert len(found.windows) >= 2


def test_a_budget_without_an_interior_minimum_is_left_out_and_named():
    table = isoflops()
    largest = table["flops"].max()
    sizes = np.sort(table[table["flops"] == largest]["params"])
    one_sided = table[(table["flops"] < largest) | (table["params"] < sizes[3])]
    extra = table[table["flops"] == 1e18].assign(flops=1e17, loss=[3, 4, 5, 6, 7, 6, 5, 4, 3])
    found = parabolas(pd.concat([one_sided, extra]))
    assert list(found.budgets["flops"].round(-15)) == pytest.approx([1e18, 1e19, 1e20])
    text = " ".join(found.warnings)
    assert "budget 1e+21: only 3 sizes" in text
    assert "budget 1e+17: the parabola opens downwards" in text
    assert "only 3 budgets" in text


def test_no_optimum_is_an_error():
    table = isoflops((1e20,))
    with pytest.raises(ConfigError, match="two budgets"):
        parabolas(table)


def test_the_envelope_finds_the_exponent_of_the_law():
    rows = []
    for size in np.geomspace(1e7, 1e10, 30):
        for tokens in np.geomspace(2 * size, 300 * size, 40):
            rows.append((f"{size:.3g}", size, 6 * size * tokens, LAW.loss(size, tokens, tokens)))
    curves = pd.DataFrame(rows, columns=["run", "params", "flops", "loss"])
    found = envelope(curves.astype({"loss": float}))
    assert found.params.exponent == pytest.approx(EXPONENT, abs=0.01)
    assert any("favours small models" in warning for warning in found.warnings)
    two = curves[curves["params"].isin(curves["params"].unique()[:2])]
    with pytest.raises(ConfigError, match="more sizes"):
        envelope(two.astype({"loss": float}))
