"""Laws fitted to the arms of a study, where their data support one, and their isoFLOP curves."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

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
from pretrain.study.report.selection import Selection, select_law
from pretrain.study.tuned import best_settings

SAME_COMPUTE = 0.02
"""Relative distance of computes that count as one budget."""
FEWEST_SIZES = 4
"""Sizes that a parabola with three coefficients needs to be checked by one more."""


FITTED = ("data_constrained", "interior_optimum")
"""Laws of repeated tokens; the second one describes overfitted ends of schedules too."""


@dataclass(frozen=True)
class ArmFit:
    """Law of one arm with the rows that it was fitted to."""

    fitted: Fitted
    rows: pd.DataFrame
    chosen: bool = True
    """True for the law of the arm that predicts best."""


@dataclass(frozen=True)
class Laws:
    """Fits of a study."""

    fits: list[ArmFit]
    missing: list[str]
    """A sentence for each arm that has no data-constrained law."""
    selections: list[Selection]
    """Choice among the laws of each arm."""

    @property
    def chosen(self) -> list[Fitted]:
        """Laws that predict best, one an arm and likelihood."""
        return [fit.fitted for fit in self.fits if fit.chosen]


def fit_arms(table: pd.DataFrame, resamples: int) -> Laws:
    """Laws of each arm and likelihood with bootstrap, compared by held-out prediction."""
    laws = Laws([], [], [])
    for arm, rows in table.groupby("arm"):
        several = rows["likelihood"].nunique() > 1
        for likelihood, part in rows.groupby("likelihood"):
            label = f"{arm} ({likelihood})" if several else str(arm)
            _fit_arm(label, str(arm), part, resamples, laws)
    return laws


def _fit_arm(label: str, arm: str, table: pd.DataFrame, resamples: int, laws: Laws) -> None:
    """Append the fits of one arm, measured by one likelihood, to `laws`."""
    best, note = best_settings(table)
    found: dict[str, tuple[Fitted, pd.DataFrame]] = {}
    for law in FITTED:
        try:
            rows = choose_rows(best, law, arm=arm).table
            _require(rows, law)
            fitted = fit_study(best, law, arm=arm)
        except (ConfigError, np.linalg.LinAlgError) as error:
            if LAWS[law].monotone:
                laws.missing.append(f"{label}: {error}")
            continue
        notes = (note, *fitted.warnings) if note else fitted.warnings
        found[law] = replace(fitted, warnings=notes), rows
    every = choose_rows(best, FITTED[-1], arm=arm).table if found else best
    selection = select_law(label, every, {law: fitted for law, (fitted, _) in found.items()})
    laws.selections.append(selection)
    for law, (fitted, rows) in found.items():
        drawn = bootstrap(fitted, rows, resamples=resamples) if resamples else fitted
        laws.fits.append(ArmFit(drawn, rows, law == selection.chosen))


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
