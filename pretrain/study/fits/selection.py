"""Comparison of candidate laws by held-out prediction and information criteria.

A law is judged by what it predicts, not by its coefficients. Two kinds of rows are held out: whole
configurations in turn, and the largest compute, which is what laws are used for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from pretrain.study.fits.fit import cluster_codes, fit_law
from pretrain.study.fits.fitted import Fitted


def compare_laws(
    table: pd.DataFrame,
    candidates: Sequence[str] | Mapping[str, Mapping[str, Any]],
    *,
    folds: int = 5,
    largest: float = 0.2,
    seed: int = 0,
) -> pd.DataFrame:
    """One row for each candidate, the best held-out prediction first.

    Columns: `coefficients` (free ones), `objective`, `r2`, `trend`; `aic` and `bic` for Laplace
    errors of the log loss with each configuration counting once; `folds_error`, mean absolute
    error of the predicted log loss over configurations held out in turn; `largest_error`, the same
    for the configurations with the largest compute, and `largest_bias`, its mean with sign.

    Args:
        table: Rows as `fit_law` takes them, the same for every candidate.
        candidates: Names of laws, or options of `fit_law` by a label; `law` names the law there.
        folds: Number of parts of the configurations.
        largest: Share of the configurations, by compute, in the second test.
        seed: Seed of the division into parts.
    """
    if not isinstance(candidates, Mapping):
        candidates = {name: {"law": name} for name in candidates}
    codes = cluster_codes(table)
    count = int(codes.max()) + 1
    part = np.random.default_rng(seed).permutation(count) % folds
    compute = (table["params"] * table["tokens"]).groupby(codes).max().to_numpy()
    top = compute >= np.quantile(compute, 1 - largest)
    rows = []
    for label, given in candidates.items():
        options = {**given}
        law = options.pop("law", label)
        full = fit_law(table, law, **options)
        errors = np.concatenate(
            [_held_out(table, part[codes] == fold, full, options) for fold in range(folds)]
        )
        extrapolated = _held_out(table, top[codes], full, options)
        rows.append(
            {
                "candidate": label,
                "coefficients": _free(full),
                **{name: full.diagnostics[name] for name in ("objective", "r2", "trend")},
                **{name: full.diagnostics[name] for name in ("aic", "bic")},
                "folds_error": float(np.abs(errors).mean()),
                "largest_error": float(np.abs(extrapolated).mean()),
                "largest_bias": float(extrapolated.mean()),
            }
        )
    return pd.DataFrame(rows).sort_values("folds_error", ignore_index=True)


def _held_out(
    table: pd.DataFrame, out: np.ndarray, full: Fitted, options: Mapping[str, Any]
) -> np.ndarray:
    """ln(predicted / measured) of the rows held out, the fit starting from the full one."""
    rest = {**options, "starts": [full.values], "check": False}
    fitted = fit_law(table[~out], full.law_name, **rest)
    held = table[out]
    predicted = fitted.loss(*(held[name] for name in ("params", "tokens", "unique_tokens")))
    return np.log(predicted / held["loss"].to_numpy(float))


def _free(fitted: Fitted) -> int:
    return len(fitted.values) - len({*fitted.tied, *fitted.fixed})
