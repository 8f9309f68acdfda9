"""Fits of a law to measured losses: robust, from a grid of starts, with a global check.

The sum of Huber losses of log residuals is minimised over log coefficients in float64, as Hoffmann
et al. (arXiv 2203.15556, approach 3) do. The errors of the information criteria and intervals are
taken as Laplace distributed, which a small threshold amounts to, and each cluster of points counts
once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

import numpy as np
import pandas as pd

from pretrain.errors import ConfigError
from pretrain.study.fits.cautions import cautions, residual_trend
from pretrain.study.fits.fitted import RANGED, Fitted
from pretrain.study.fits.laws import LAWS
from pretrain.study.fits.problem import LEAST_ABSOLUTE, Problem, Solution

NEEDED = ("params", "tokens", "unique_tokens", "loss")


def fit_law(
    table: pd.DataFrame,
    law: str,
    *,
    delta: float | None = 1e-3,
    tied: Mapping[str, str] | None = None,
    fixed: Mapping[str, float] | None = None,
    errors: str | None = None,
    starts: Sequence[Mapping[str, float]] | None = None,
    check: bool = True,
    source: str = "",
    notes: Sequence[str] = (),
    digitised: bool = False,
) -> Fitted:
    """Law fitted to the rows of a table, with diagnostics and warnings.

    Args:
        table: Columns `params`, `tokens`, `unique_tokens`, `loss`; `configuration` names clusters,
            `family`, `arm` and `likelihood`, one value each, are copied to the result.
        law: Name of a law of `LAWS`.
        delta: Threshold of Huber's loss; None for least absolute deviations.
        tied: Coefficients held equal to another, e.g. `{"beta": "alpha"}`.
        fixed: Coefficients held at a value, e.g. those of the first of two stages.
        errors: Column with the standard error of each loss, e.g. `noise_error`. Noisier rows then
            weigh less, against the scatter of the rows around the law.
        starts: Starts instead of the grid. The result is the local optimum that they lead to.
        check: Look for a better optimum by differential evolution. From the grid the better one is
            taken, from given starts it is only reported.
        source: Origin of the table.
        notes: Warnings of earlier steps, e.g. of rows that were dropped.
        digitised: True where losses were read from a figure.

    Raises:
        ConfigError: An unknown law or coefficient, a missing column or too few rows.
    """
    problem = pose(table, law, delta=delta, tied=tied, fixed=fixed)
    solution, better = _optimize(problem, starts, check)
    if errors is not None:
        problem = problem.replace(weights=_noise_weights(table, errors, problem, solution))
        solution, better = _optimize(problem, [problem.values(solution.theta)], check)
    kept = {name: _only(table, name) for name in ("family", "arm", "likelihood")}
    clusters = cluster_codes(table)
    return Fitted(
        law_name=law,
        values={name: float(value) for name, value in problem.values(solution.theta).items()},
        family=kept["family"],
        arm=kept["arm"],
        likelihood=cast(Literal["exact", "bound"], kept["likelihood"] or "exact"),
        support=support(table),
        diagnostics=diagnose(problem, solution, clusters),
        delta=problem.delta,
        tied=dict(tied or {}),
        fixed=tuple(fixed or ()),
        warnings=(
            *notes,
            *cautions(table, problem, solution, clusters, better=better, digitised=digitised),
        ),
        source=source,
    )


def pose(
    table: pd.DataFrame,
    law: str,
    *,
    delta: float | None = 1e-3,
    tied: Mapping[str, str] | None = None,
    fixed: Mapping[str, float] | None = None,
) -> Problem:
    """Numeric problem of a table; every row weighs the same."""
    if law not in LAWS:
        raise ConfigError(f"unknown law {law!r}; known are {', '.join(sorted(LAWS))}")
    form, tied, fixed = LAWS[law], dict(tied or {}), dict(fixed or {})
    wrong = (tied.keys() | set(tied.values()) | fixed.keys()) - set(form.coefficients)
    if wrong:
        known = ", ".join(form.coefficients)
        raise ConfigError(f"the law {law} has no {', '.join(sorted(wrong))}; it has {known}")
    missing = [name for name in NEEDED if name not in table]
    if missing:
        raise ConfigError(f"a fit needs the columns {', '.join(NEEDED)}; no {', '.join(missing)}")
    columns = {name: table[name].to_numpy(float) for name in NEEDED}
    for name, column in columns.items():
        if not (np.isfinite(column) & (column > 0)).all():
            raise ConfigError(f"the column {name} must be positive and finite; drop failed runs")
    free = len(form.coefficients) - len(tied.keys() | fixed.keys())
    if len(table) <= free:
        raise ConfigError(f"{len(table)} rows cannot fix the {free} coefficients of {law}")
    return Problem(
        form,
        columns["params"],
        columns["tokens"],
        columns["unique_tokens"],
        columns["loss"],
        np.ones(len(table)),
        LEAST_ABSOLUTE if delta is None else delta,
        tied,
        fixed,
    )


def posed(fitted: Fitted, table: pd.DataFrame) -> tuple[Problem, np.ndarray]:
    """Problem [of the table] under the settings of a fit, and the fit's logarithms as its start."""
    problem = pose(
        table,
        fitted.law_name,
        delta=fitted.delta,
        tied=fitted.tied,
        fixed={name: fitted.values[name] for name in fitted.fixed},
    )
    return problem, problem.theta(fitted.values)


def cluster_codes(table: pd.DataFrame) -> np.ndarray:
    """Number of the cluster [n] of each row: its `configuration`, else equal N, D and U."""
    keys = ["configuration"] if "configuration" in table else ["params", "tokens", "unique_tokens"]
    return table.groupby(keys, sort=False, dropna=False).ngroup().to_numpy()


def support(table: pd.DataFrame) -> dict[str, tuple[float, float]]:
    """Smallest and largest value of each quantity of the rows; FLOPs are 6 N D where not given."""
    columns: dict[str, Any] = {name: table[name] for name in RANGED if name in table}
    columns["epochs"] = table["tokens"] / table["unique_tokens"]
    columns.setdefault("flops", 6 * table["params"] * table["tokens"])
    return {name: (float(column.min()), float(column.max())) for name, column in columns.items()}


def diagnose(problem: Problem, solution: Solution, clusters: np.ndarray) -> dict[str, float]:
    """Quality of a fit.

    `r2` is that of the loss, `scatter` the mean absolute log residual, `gradient` the relative
    gradient at the end (0 at an exact optimum), `trend` the share of the residuals' variance that
    epochs and size explain (of a law that fits it is small).
    """
    residual = problem.residuals(solution.theta)
    measured = problem.loss
    error = measured * np.expm1(residual)
    scatter = float(np.average(np.abs(residual), weights=problem.weights))
    count, groups = len(problem.free) + 1, len(np.unique(clusters))
    log_likelihood = -groups * (np.log(2 * max(scatter, 1e-300)) + 1)
    return {
        "objective": solution.objective,
        "r2": 1 - float((error**2).sum() / ((measured - measured.mean()) ** 2).sum()),
        "scatter": scatter,
        "gradient": solution.gradient,
        "trend": residual_trend(problem, residual),
        "points": float(len(residual)),
        "clusters": float(groups),
        "aic": 2 * count - 2 * log_likelihood,
        "bic": count * float(np.log(groups)) - 2 * log_likelihood,
    }


def _optimize(
    problem: Problem, starts: Sequence[Mapping[str, Any]] | None, check: bool
) -> tuple[Solution, Solution | None]:
    """Optimum, and a better one elsewhere where given starts missed it."""
    if not problem.free:
        return problem.solve(np.zeros(0)), None
    if starts is None:
        first = [problem.solve(start, polish=False) for start in problem.starts()]
    else:
        first = [problem.solve(problem.theta(start), polish=False) for start in starts]
    best = problem.solve(min(first, key=lambda end: end.objective).theta)
    if not check:
        return best, None
    found = problem.search()
    if found.objective >= best.objective * (1 - 1e-6):
        return best, None
    return (found, None) if starts is None else (best, found)


def _noise_weights(
    table: pd.DataFrame, errors: str, problem: Problem, solution: Solution
) -> np.ndarray:
    """Weights [n] with mean 1: the scatter of the rows against that and each row's error."""
    if errors not in table:
        raise ConfigError(f"no column {errors}; give the column of standard errors, or none")
    scatter = 1.25 * np.median(np.abs(problem.residuals(solution.theta)))
    noise = np.nan_to_num(table[errors].to_numpy(float)) / problem.loss
    weights = scatter**2 / (scatter**2 + noise**2)
    return weights / weights.mean()


def _only(table: pd.DataFrame, name: str) -> str:
    """The one value of a column, or an empty string where the table lacks it."""
    if name not in table:
        return ""
    found = sorted(set(table[name].astype(str)))
    if len(found) > 1:
        raise ConfigError(f"one fit is of one {name}, the rows have {', '.join(found)}; choose one")
    return found[0]
