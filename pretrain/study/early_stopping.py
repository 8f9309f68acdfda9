"""Outcome of each arm at each unique budget: best evaluation, last one, overfitting, gap.

The best evaluation is what early stopping on the validation text would have kept. Runs that differ
in the seed alone are averaged first. All runs of a study are measured on the same text, so that
only the noise of the bound and the spread over seeds count as errors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from pretrain.study.curves import Curve, Point
from pretrain.study.tuned import settings


@dataclass(frozen=True)
class Evaluation:
    """Evaluation of a configuration, averaged over its seeds."""

    epochs: float
    flops: float
    loss: float
    error: float
    """Standard error of noise and seeds; infinite where unknown."""
    seeds: int
    params: float
    configuration: str
    setting: str = ""
    """Values of the axes that the arm was tuned over."""


@dataclass(frozen=True)
class Outcome:
    """Result of one arm at one unique budget."""

    arm: str
    family: str
    likelihood: str
    unique_tokens: float
    best: Evaluation
    final: Evaluation
    """Evaluation of the best size and setting at the most epochs."""
    overfits: bool
    """True where the final loss exceeds the best one by more than twice their error."""
    finished: bool
    """True where the final evaluation is that of a whole schedule."""


@dataclass(frozen=True)
class Gap:
    """Difference of two arms with early stopping at one unique budget."""

    arm: str
    reference: str
    unique_tokens: float
    gap: float
    """Loss of the arm minus that of the reference in nats per token; negative is better."""
    error: float
    """Standard error; infinite where unknown."""


@dataclass(frozen=True)
class Trend:
    """Straight line through gaps over log10 U, weighted by their errors."""

    arm: str
    slope: float
    """Nats per token for ten times more unique tokens."""
    error: float
    """Standard error that follows from the errors of the gaps, enlarged where these do not explain
    the distances from the line; infinite where unknown."""
    points: int


def noise_errors(table: pd.DataFrame) -> pd.Series:
    """Noise error of each row, or the standard error, which covers it; infinite where unknown."""
    noise = pd.to_numeric(table["noise_error"], errors="coerce")
    total = pd.to_numeric(table["standard_error"], errors="coerce")
    return noise.fillna(total).fillna(math.inf)


def averaged(table: pd.DataFrame) -> pd.DataFrame:
    """Mean over seeds: one row for each evaluation of each configuration, in order of training.

    Its columns are `arm`, `family`, `likelihood`, `configuration`, `params`, `unique_tokens`,
    `setting`, `epochs`, `planned_epochs`, `final`, `flops`, `loss`, `error` and `seeds`.
    """
    given = table[np.isfinite(pd.to_numeric(table["loss"], errors="coerce"))].copy()
    given["setting"] = settings(given)  # first, as every other column is an axis
    given["error"] = noise_errors(given)
    given["final"] = given["final"].fillna(False).astype(bool)
    given["planned_epochs"] = given["planned_epochs"].fillna(given["epochs"])
    keys = ["arm", "family", "configuration", "planned_epochs", "final", "epochs"]
    rows = []
    for values, group in given.groupby(keys, sort=True):
        count = len(group)
        noise = math.sqrt(float((group["error"] ** 2).sum())) / count
        spread = float(group["loss"].std(ddof=1)) / math.sqrt(count) if count > 1 else 0.0
        rows.append(
            dict(zip(keys, values, strict=True))
            | {
                "likelihood": group["likelihood"].iloc[0],
                "setting": group["setting"].iloc[0],
                "params": float(group["params"].iloc[0]),
                "unique_tokens": float(group["unique_tokens"].iloc[0]),
                "flops": float(group["flops"].mean()),
                "loss": float(group["loss"].mean()),
                # the spread over seeds contains the noise of their evaluations
                "error": max(noise, spread),
                "seeds": count,
            }
        )
    return pd.DataFrame(rows)


def outcomes(table: pd.DataFrame) -> list[Outcome]:
    """Outcome of every arm at every unique budget, in the order of budget and name."""
    means = averaged(table)
    if means.empty:
        return []
    found = []
    for (unique, family, arm), group in means.groupby(["unique_tokens", "family", "arm"]):
        best = group.loc[group["loss"].idxmin()]
        same = (group["params"] == best["params"]) & (group["setting"] == best["setting"])
        final = group[same].sort_values(["epochs", "final"]).iloc[-1]
        ends = [_evaluation(best), _evaluation(final)]
        curve = Curve(str(arm), tuple(_point(item) for item in ends))
        found.append(
            Outcome(
                arm=str(arm),
                family=str(family),
                likelihood=str(best["likelihood"]),
                unique_tokens=float(unique),
                best=ends[0],
                final=ends[1],
                overfits=curve.overfits,
                finished=bool(final["final"]),
            )
        )
    return found


def reference_arm(found: Sequence[Outcome]) -> str | None:
    """Autoregressive arm with the lowest mean loss over its budgets; None where there is none."""
    losses: dict[str, list[float]] = {}
    for item in found:
        if item.family == "autoregressive":
            losses.setdefault(item.arm, []).append(item.best.loss)
    most = max((len(values) for values in losses.values()), default=0)
    complete = {arm: values for arm, values in losses.items() if len(values) == most}
    return min(complete, key=lambda arm: (float(np.mean(complete[arm])), arm), default=None)


def gaps(found: Sequence[Outcome], reference: str) -> list[Gap]:
    """Gap of each other arm to `reference` at every budget that both have."""
    base = {item.unique_tokens: item for item in found if item.arm == reference}
    result = []
    for item in found:
        other = base.get(item.unique_tokens)
        if item.arm == reference or other is None:
            continue
        error = math.hypot(item.best.error, other.best.error)
        difference = item.best.loss - other.best.loss
        result.append(Gap(item.arm, reference, item.unique_tokens, difference, error))
    return sorted(result, key=lambda gap: (gap.arm, gap.unique_tokens))


def trend(found: Sequence[Gap]) -> Trend | None:
    """Weighted least squares of the gaps of one arm over log10 U; None for fewer than two."""
    if len({gap.unique_tokens for gap in found}) < 2:
        return None
    x = np.log10([gap.unique_tokens for gap in found])
    y = np.array([gap.gap for gap in found])
    errors = np.array([gap.error for gap in found])
    known = bool(np.all(np.isfinite(errors)) and np.all(errors > 0))
    weights = 1 / errors**2 if known else np.ones(len(x))
    center = np.average(x, weights=weights)
    scatter = float(np.sum(weights * (x - center) ** 2))
    slope = float(np.sum(weights * (x - center) * y)) / scatter
    misfit = float(
        np.sum(weights * (y - np.average(y, weights=weights) - slope * (x - center)) ** 2)
    )
    enlarged = max(1.0, misfit / (len(x) - 2)) if len(x) > 2 else 1.0
    error = math.sqrt(enlarged / scatter) if known else math.inf
    return Trend(found[0].arm, slope, error, len(x))


def _evaluation(row: pd.Series) -> Evaluation:
    return Evaluation(
        epochs=float(row["epochs"]),
        flops=float(row["flops"]),
        loss=float(row["loss"]),
        error=float(row["error"]),
        seeds=int(row["seeds"]),
        params=float(row["params"]),
        configuration=str(row["configuration"]),
        setting=str(row["setting"]),
    )


def _point(item: Evaluation) -> Point:
    return Point(item.epochs, item.flops, item.loss, item.error, 0.0)
