"""Compute-optimal sizes of each arm by approaches 1 and 2 of Hoffmann et al., side by side."""

from __future__ import annotations

from collections.abc import Callable

import pandas as pd

from pretrain.errors import ConfigError
from pretrain.study.figures.style import quantity
from pretrain.study.fits.isoflop import Optima, envelope, parabolas
from pretrain.study.report.html import bullets, paragraph, table
from pretrain.study.tuned import best_settings

Approach = Callable[[pd.DataFrame], Optima]
FRESH = 1.01
"""Passes over the unique tokens up to which tokens count as fresh."""


def optima_table(data: pd.DataFrame) -> str:
    """Exponents of the optimal size by the envelope of curves and by isoFLOP parabolas."""
    rows, notes = [], []
    for arm, given in data.groupby("arm"):
        for label, part in _parts(str(arm), best_settings(given)[0]):
            curves = part[["run", "params", "loss"]].assign(flops=part["flops_6nd"])
            ends = curves[part["final"].fillna(False).astype(bool)]
            approaches: dict[str, tuple[Approach, pd.DataFrame]] = {
                "1, envelope of curves": (envelope, curves),
                "2, isoFLOP parabolas": (parabolas, ends),
            }
            for name, (approach, points) in approaches.items():
                cells, texts = _cells(approach, points)
                if cells is not None:
                    rows.append((label, name, *cells))
                notes += [f"{label}, approach {name[0]}: {text}" for text in texts]
    if not rows:
        reason = "; ".join(dict.fromkeys(notes)) or "the study has no evaluation"
        return paragraph(f"No compute-optimal size: {reason}.", "omitted")
    headers = ("arm", "approach", "size N", "tokens D", "computes", "sizes", "range of FLOPs")
    caption = (
        "Compute-optimal size and tokens as power laws of C = 6 N D; ± is twice the standard error "
        "of the regression. Approach 1 takes the size with the lowest loss at each compute along "
        "validation curves, approach 2 the minimum of a parabola at each budget of whole runs. "
        "Evaluations before the end of a schedule have a high learning rate: approach 1 is biased "
        "to small models, and its computes are not independent."
    )
    return table(headers, rows, caption) + bullets(dict.fromkeys(notes))


def _parts(arm: str, rows: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """Rows of fresh tokens where several sizes have them, else those of the largest grid."""
    rows = rows[rows["loss"].notna()]
    fresh = rows[rows["tokens"] <= FRESH * rows["unique_tokens"]]
    if fresh["params"].nunique() >= 3:
        return [(f"{arm}, fresh tokens", fresh)]
    sizes = rows.groupby("unique_tokens")["params"].nunique()
    if sizes.empty:
        return []
    unique = float(sizes.idxmax())
    return [(f"{arm}, U = {quantity(unique)}", rows[rows["unique_tokens"] == unique])]


def _cells(approach: Approach, points: pd.DataFrame) -> tuple[tuple[object, ...] | None, list[str]]:
    """Cells of one row, or None; reasons and warnings."""
    if points["params"].nunique() < 3:
        return None, [f"{points['params'].nunique()} model sizes; it needs three"]
    try:
        found = approach(points)
    except ConfigError as error:
        return None, [str(error)]
    budgets = found.budgets
    ends = f"{budgets['flops'].min():.2g} to {budgets['flops'].max():.2g}"
    cells = (
        _law("N", found.params.coefficient, found.params.exponent, found.params.error),
        _law("D", found.tokens.coefficient, found.tokens.exponent, found.tokens.error),
        len(budgets),
        budgets["params"].nunique(),
        ends,
    )
    return cells, list(found.warnings)


def _law(name: str, coefficient: float, exponent: float, error: float) -> str:
    about = f" ± {2 * error:.2g}" if error == error else ""
    return f"{name} = {coefficient:.3g} C^({exponent:.3f}{about})"
