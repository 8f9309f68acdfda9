"""Uncertainty of a fit by resampling whole configurations.

Runs of one configuration that differ in their seed stay together, as they share what the law does
not describe. Each resample is a set of weights on the same rows, so that its fit starts from the
full one.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd

from pretrain.study.fits.fit import cluster_codes, posed
from pretrain.study.fits.fitted import Fitted


def bootstrap(
    fitted: Fitted, table: pd.DataFrame, *, resamples: int = 400, seed: int = 0
) -> Fitted:
    """The fit with `resamples` sets of coefficients, fitted to configurations drawn with return.

    Args:
        fitted: A fit of `fit_law`, whose settings are kept. Coefficients that it held stay.
        table: The rows that were fitted.
        resamples: Number of resamples.
        seed: Seed of the draws.
    """
    problem, start = posed(fitted, table)
    codes = cluster_codes(table)
    count = int(codes.max()) + 1
    rng = np.random.default_rng(seed)
    directions = problem.whitening(start)
    found = []
    for _ in range(resamples):
        drawn = np.bincount(rng.integers(count, size=count), minlength=count)
        weighted = problem.replace(weights=drawn[codes].astype(float))
        found.append(weighted.refine(start, directions).theta)
    values = problem.values(np.stack(found))
    return replace(
        fitted,
        resamples={name: value.tolist() for name, value in values.items()},
        diagnostics={**fitted.diagnostics, "resamples": float(resamples)},
    )


def interval(samples: np.ndarray, level: float = 0.9) -> tuple[np.ndarray, np.ndarray]:
    """Central interval of samples [r, ...] over the resamples, infinite ones included."""
    tail = (1 - level) / 2
    low, high = np.quantile(samples, [tail, 1 - tail], axis=0, method="nearest")
    return low, high
