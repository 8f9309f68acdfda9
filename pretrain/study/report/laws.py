"""Laws fitted to the arms of a study, where their data support one, and their isoFLOP curves."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd

from pretrain.errors import ConfigError
from pretrain.study.figures.isoflop import IsoFlopCurve, IsoFlopStudy
from pretrain.study.figures.style import quantity
from pretrain.study.fits.bootstrap import bootstrap
from pretrain.study.fits.fitted import Fitted
from pretrain.study.fits.isoflop import parabolas
from pretrain.study.fits.laws import LAWS
from pretrain.study.fits.rows import choose_rows, fit_study

SAME_COMPUTE = 0.02
"""Relative distance of computes that count as one budget."""
FEWEST_SIZES = 4
"""Sizes that a parabola with three coefficients needs to be checked by one more."""


@dataclass(frozen=True)
class ArmFit:
    """Law of one arm with the rows that it was fitted to."""

    fitted: Fitted
    rows: pd.DataFrame


def fit_arms(table: pd.DataFrame, resamples: int) -> tuple[list[ArmFit], list[str]]:
    """Data-constrained law of each arm with bootstrap, one with an optimum where runs overfit.

    Returns the fits, and a sentence for each arm that has none.
    """
    fits: list[ArmFit] = []
    missing: list[str] = []
    for arm in sorted(set(table["arm"])):
        for law in ("data_constrained", "interior_optimum"):
            try:
                rows = choose_rows(table, law, arm=arm)
                _require(rows.table, law)
                fitted = fit_study(table, law, arm=arm)
            except (ConfigError, np.linalg.LinAlgError) as error:
                if LAWS[law].monotone:
                    missing.append(f"{arm}: {error}")
                continue
            if resamples and LAWS[law].monotone:
                fitted = bootstrap(fitted, rows.table, resamples=resamples)
            fits.append(ArmFit(fitted, rows.table))
    return fits, missing


def _require(rows: pd.DataFrame, law: str) -> None:
    """Raise ConfigError where rows cannot determine the coefficients of a law."""
    sizes, lengths = rows["params"].nunique(), rows["epochs"].round(6).nunique()
    if sizes < 2:
        raise ConfigError("one model size only; a law of N and D needs two or more")
    if lengths < 3:
        raise ConfigError(f"{lengths} numbers of epochs; a law of repeated data needs three")
    clusters, needed = rows["configuration"].nunique(), len(LAWS[law].coefficients) + 2
    if clusters < needed:
        raise ConfigError(f"{clusters} configurations; the law needs {needed} or more")


def data_constrained(fits: list[ArmFit]) -> list[ArmFit]:
    """Fits of the data-constrained law."""
    return [fit for fit in fits if fit.fitted.law_name == "data_constrained"]


def isoflop_studies(table: pd.DataFrame) -> list[IsoFlopStudy]:
    """IsoFLOP curves of each arm: of fresh tokens where it has them, else of its best budget."""
    ends = table[table["final"].fillna(False).astype(bool)]
    studies = []
    for (family, arm), rows in ends.groupby(["family", "arm"]):
        groups = [(str(arm), rows[rows["tokens"] <= 1.01 * rows["unique_tokens"]])]
        for unique, part in rows.groupby("unique_tokens"):
            groups.append((f"{arm}, U = {quantity(float(unique))}", part))
        found = [
            study_of(label, str(family), part)
            for label, part in groups
            if part["params"].nunique() >= FEWEST_SIZES
        ]
        best = max(found, key=lambda study: len(_with_optimum(study)), default=None)
        if best is not None and _with_optimum(best):
            studies.append(best)
    return studies


def study_of(label: str, family: str, rows: pd.DataFrame) -> IsoFlopStudy:
    """IsoFLOP curves of rows with columns `flops_6nd`, `params`, `loss`, `likelihood`."""
    curves = tuple(
        _curve(flops, part)
        for flops, part in _budgets(rows)
        if part["params"].nunique() >= FEWEST_SIZES
    )
    exponent = factor = error = float("nan")
    if sum(curve.coefficients is not None for curve in curves) >= 2:
        given = rows[["params", "loss"]].assign(flops=rows["flops_6nd"])
        optima = parabolas(given, tolerance=SAME_COMPUTE)
        exponent, factor = optima.params.exponent, optima.params.coefficient
        error = optima.params.error
    return IsoFlopStudy(
        label, family, curves, exponent, factor, error, str(rows["likelihood"].iloc[0])
    )


def _with_optimum(study: IsoFlopStudy) -> list[IsoFlopCurve]:
    return [curve for curve in study.curves if curve.coefficients is not None]


def _budgets(rows: pd.DataFrame) -> Iterator[tuple[float, pd.DataFrame]]:
    """Rows of each compute C = 6 N D; those closer than `SAME_COMPUTE` are one budget."""
    ordered = rows.sort_values(["flops_6nd", "params"])
    logs = np.log(ordered["flops_6nd"].to_numpy(float))
    starts = np.diff(logs, prepend=-np.inf) > SAME_COMPUTE
    for _, part in ordered.groupby(np.cumsum(starts)):
        yield float(np.exp(np.log(part["flops_6nd"].to_numpy(float)).mean())), part


def _curve(flops: float, part: pd.DataFrame) -> IsoFlopCurve:
    """Parabola in ln N through the mean losses of each size, if its minimum lies between them."""
    means = part.groupby("params")["loss"].mean()
    sizes, losses = means.index.to_numpy(float), means.to_numpy(float)
    x = np.log(part["params"].to_numpy(float))
    curvature, slope, constant = np.polyfit(x, part["loss"].to_numpy(float), 2)
    at = -slope / (2 * curvature) if curvature > 0 else np.nan
    if not x.min() < at < x.max():
        return IsoFlopCurve(flops, sizes, losses, None)
    coefficients = (float(curvature), float(slope), float(constant))
    return IsoFlopCurve(flops, sizes, losses, coefficients, float(np.exp(at)))
