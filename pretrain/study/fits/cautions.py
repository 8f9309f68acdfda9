"""Warnings of the known traps of scaling-law fits.

Each names what was seen and what to do. The sources are the replication of Hoffmann's fit (arXiv
2404.10102) and refits of published data-constrained laws.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pandas as pd

from pretrain.study.fits.problem import POSSIBLE, Problem, Solution

TREND = 0.3
"""Share of the residuals' variance, explained by epochs and size, above which a law is unfit."""


def cautions(
    table: pd.DataFrame,
    problem: Problem,
    solution: Solution,
    clusters: np.ndarray,
    *,
    better: Solution | None = None,
    digitised: bool = False,
) -> list[str]:
    """Warnings for a fit of the rows of a table, in the order of their weight."""
    found: list[str] = []
    if better is not None:
        values = ", ".join(
            f"{name} {problem.values(better.theta)[name]:.4g}" for name in problem.free
        )
        found.append(
            f"a better optimum exists: objective {better.objective:.6g} instead of "
            f"{solution.objective:.6g} at {values}; start from the grid"
        )
    found += _optimizer(problem, solution)
    found += _form(table, problem, solution)
    found += _design(table, problem, clusters)
    found += _identification(problem, solution, clusters)
    found += _outliers(problem, solution, clusters)
    if digitised or _rounded(problem.loss):
        found.append(
            "the losses are rounded or read from a figure: their error is of the size of the "
            "reading, and the intervals do not contain it"
        )
    return found


def residual_trend(problem: Problem, residual: np.ndarray) -> float:
    """Share of the residuals' variance that a quadratic in ln epochs and ln N explains."""
    if len(residual) < 15 or np.ptp(residual) < 1e-12:
        return 0.0
    epochs = np.log(problem.tokens / problem.unique)
    size = np.log(problem.params)
    if np.ptp(epochs) < 0.1:
        epochs = np.log(problem.tokens)
    x, y = epochs - epochs.mean(), size - size.mean()
    terms = np.stack([np.ones_like(x), x, y, x * x, x * y, y * y], axis=-1)
    # Ranks keep a few large residuals from deciding.
    ranks = np.argsort(np.argsort(residual)).astype(float)
    rest = ranks - terms @ np.linalg.lstsq(terms, ranks, rcond=None)[0]
    share = 1 - rest.var() / ranks.var()
    # Without a trend five terms explain 5/(n - 1) on average.
    expected = 5 / (len(residual) - 1)
    return float(max(0.0, (share - expected) / (1 - expected)))


def rising(table: pd.DataFrame, sigmas: float = 2.0) -> np.ndarray:
    """True [n] for rows above a row of the same N, U and seed with fewer tokens: overfitted ones.

    "Above" means by more than `sigmas` times their noise error, where the table has one.
    """
    frame = table.reset_index(drop=True)
    keys = [name for name in ("params", "unique_tokens", "arm", "seed") if name in frame]
    noise = frame["noise_error"] if "noise_error" in frame else pd.Series(0.0, frame.index)
    frame = frame.assign(noise=np.nan_to_num(noise.to_numpy(float)))
    marked = np.zeros(len(frame), bool)
    for _, group in frame.groupby(keys, dropna=False):
        group = group.sort_values("tokens")
        loss, error = group["loss"].to_numpy(float), group["noise"].to_numpy(float)
        lowest = np.minimum.accumulate(loss)
        at_lowest = np.maximum.accumulate(np.where(loss == lowest, np.arange(len(loss)), 0))
        above = loss > lowest + sigmas * np.hypot(error, error[at_lowest])
        marked[group.index.to_numpy()[above]] = True
    return marked


def _optimizer(problem: Problem, solution: Solution) -> Iterator[str]:
    if solution.gradient > 1e-4:
        yield (
            f"the optimizer stopped early: relative gradient {solution.gradient:.1e}. An averaged "
            "objective does this; coefficients may be far from the optimum"
        )
    values = problem.values(solution.theta)
    for name in problem.free:
        low, high = POSSIBLE[name]
        if not low * 1.001 < values[name] < high / 1.001:
            yield f"{name} ran into its limit {values[name]:.3g}: the data do not bound it"


def _form(table: pd.DataFrame, problem: Problem, solution: Solution) -> Iterator[str]:
    if problem.law.monotone:
        count = int(rising(table).sum())
        if count:
            yield (
                f"{count} of {len(table)} rows are overfitted, which the law {problem.law.name} "
                "cannot describe: drop them, or fit interior_optimum"
            )
    repeated = int((problem.tokens > 1.01 * problem.unique).sum())
    if problem.law.name == "single_epoch" and repeated:
        yield (
            f"{repeated} of {len(table)} rows have repeated tokens, which the single-epoch law "
            "takes for fresh ones"
        )
    trend = residual_trend(problem, problem.residuals(solution.theta))
    if trend > TREND:
        yield (
            f"residuals follow epochs and size ({trend:.0%} of their variance): the law "
            f"{problem.law.name} does not have the form of these data"
        )


def _design(table: pd.DataFrame, problem: Problem, clusters: np.ndarray) -> Iterator[str]:
    if problem.law.name != "single_epoch":
        budgets = len(np.unique(problem.unique.round(-3)))
        if budgets < 3:
            yield f"only {budgets} unique-token budgets: the dependence on U is not tested"
    sizes = len(np.unique(np.log(problem.params).round(2)))
    if sizes < 4:
        yield f"only {sizes} model sizes: the exponent of N rests on them"
    groups = len(np.unique(clusters))
    if groups < 3 * len(problem.free):
        yield f"only {groups} configurations for {len(problem.free)} coefficients"
    keys = ["params", "tokens", "unique_tokens"]
    repeats = int(table.duplicated(keys).sum())
    if repeats and groups > len(table) - repeats:
        yield (
            f"{repeats} rows repeat the N, D and U of another, e.g. with another seed, but count "
            "as independent configurations: give the column `configuration`"
        )


def _identification(problem: Problem, solution: Solution, clusters: np.ndarray) -> Iterator[str]:
    """Objective with R_D or R_N at a third and three times its value, the others refitted."""
    values = {name: float(value) for name, value in problem.values(solution.theta).items()}
    for name in (name for name in ("R_D", "R_N") if name in problem.free):
        rises = []
        for factor in (1 / 3, 3.0):
            held = problem.replace(fixed={**problem.fixed, name: values[name] * factor})
            end = held.solve(held.theta(values)).objective
            ratio = max(1.0, end / max(solution.objective, 1e-300))
            rises.append(2 * len(np.unique(clusters)) * np.log(ratio))
        if min(rises) < 2.7:  # 90 % of chi squared with one degree of freedom
            yield (
                f"flat optimum: three times more or less than {name} {values[name]:.3g} fits "
                "nearly as well. Compare predictions, never this coefficient; see its profile"
            )


def _outliers(problem: Problem, solution: Solution, clusters: np.ndarray) -> Iterator[str]:
    """Dependence of the exponents on the worst two per cent of the configurations."""
    if not problem.free:
        return
    worst = pd.Series(np.abs(problem.residuals(solution.theta))).groupby(clusters).max()
    count = max(1, round(0.02 * len(worst)))
    if len(worst) - count <= len(problem.free):
        return
    out = np.isin(clusters, worst.nlargest(count).index)
    refit = problem.replace(weights=np.where(out, 0.0, problem.weights)).solve(solution.theta)
    before, after = problem.values(solution.theta), problem.values(refit.theta)
    for name in ("alpha", "beta"):
        change = float(after[name] / before[name] - 1)
        if name in problem.free and abs(change) > 0.1:
            yield (
                f"{count} of {len(worst)} configurations move {name} by {change:+.0%} when dropped:"
                " report both, and do not drop them silently"
            )


def _rounded(loss: np.ndarray) -> bool:
    """True where every loss is a multiple of 0.01."""
    return len(loss) >= 5 and bool(np.abs(loss * 100 - np.round(loss * 100)).max() < 1e-6)
