"""Data efficiency: the fresh tokens that a one-epoch run of the same recipe needs for a loss.

The unit is that of NanoGPT Slowrun: losses of one-epoch runs over their tokens, interpolated.
Nothing is extrapolated: a loss outside the baseline is worth "more than" its last point or "less
than" its first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
from scipy.optimize import isotonic_regression

INTERVAL = (0.05, 0.95)
DRAWS = 2000
Scale = Literal["log", "linear"]


@dataclass(frozen=True)
class Baseline:
    """Losses of one-epoch runs over fresh tokens, from few to many."""

    tokens: tuple[float, ...]
    losses: tuple[float, ...]
    """Nats per token, the best size for each number of tokens."""
    errors: tuple[float, ...] = ()
    """Standard errors of the losses; empty counts as 0."""
    scale: Scale = "log"
    """Axis of tokens on which the interpolation is linear."""
    source: str = ""

    def __post_init__(self) -> None:
        if not self.tokens or len(self.losses) != len(self.tokens):
            raise ValueError("a baseline needs one loss for each number of tokens, at least one")
        if self.errors and len(self.errors) != len(self.tokens):
            raise ValueError("a baseline needs one error for each loss, or none")
        if list(self.tokens) != sorted(set(self.tokens)):
            raise ValueError("the tokens of a baseline must rise")


SLOWRUN = Baseline(
    tokens=(2e8, 4e8, 6e8, 8e8, 1e9, 2e9),
    losses=(3.703, 3.370, 3.200, 3.123, 3.046, 2.892),
    scale="linear",
    source="github.com/qlabs-eng/slowrun, data_eff/README.md: nanochat d12, d20, d26, the best",
)
"""Published baseline of NanoGPT Slowrun, for its 10M validation tokens of FineWeb only."""


@dataclass(frozen=True)
class Worth:
    """Fresh tokens that a loss is worth, with a 90 % interval."""

    tokens: float
    """Tokens; the first or last of the baseline where the loss lies outside it."""
    relation: Literal["equal", "more than", "less than"]
    low: float
    """0 where the interval reaches below the baseline."""
    high: float
    """Infinite where the interval reaches above the baseline."""

    def __str__(self) -> str:
        about = "" if self.relation == "equal" else f"{self.relation} "
        low = f"{self.low:,.4g}" if self.low > 0 else "below the baseline"
        high = f"{self.high:,.4g}" if np.isfinite(self.high) else "above the baseline"
        return f"{about}{self.tokens:,.4g} fresh tokens ({low} to {high})"


def worth(
    loss: float, baseline: Baseline, *, error: float = 0.0, draws: int = DRAWS, seed: int = 0
) -> Worth:
    """Fresh tokens with which the baseline reaches `loss`, with an interval from both errors.

    `draws` normal errors of the loss and of every baseline point give the interval. A baseline
    that rises somewhere is replaced by the nearest one that falls.
    """
    tokens = _tokens_of(np.array([loss]), np.array([baseline.losses]), baseline)[0]
    rng = np.random.default_rng(seed)
    errors = np.array(baseline.errors or [0.0] * len(baseline.tokens))
    losses = loss + error * rng.standard_normal(draws)
    baselines = np.array(baseline.losses) + errors * rng.standard_normal((draws, len(errors)))
    drawn = _tokens_of(losses, baselines, baseline)
    low = float(np.quantile(drawn, INTERVAL[0], method="lower"))
    high = float(np.quantile(drawn, INTERVAL[1], method="higher"))
    low, high = min(low, baseline.tokens[-1]), max(high, baseline.tokens[0])
    if tokens == 0:
        return Worth(baseline.tokens[0], "less than", low, high)
    if np.isinf(tokens):
        return Worth(baseline.tokens[-1], "more than", low, high)
    return Worth(float(tokens), "equal", low, high)


def _tokens_of(losses: np.ndarray, baselines: np.ndarray, baseline: Baseline) -> np.ndarray:
    """Tokens [n] at which falling baselines [n, k] first reach `losses` [n]; 0 and inf outside."""
    if (np.diff(baselines, axis=1) > 0).any():
        rows = [isotonic_regression(row, weights=None, increasing=False).x for row in baselines]
        baselines = np.array(rows)
    axis = np.array(baseline.tokens, float)
    if baseline.scale == "log":
        axis = np.log(axis)
    reached = baselines <= losses[:, None]
    last = reached.argmax(axis=1)  # first point that reaches the loss
    before = np.maximum(last - 1, 0)
    rows_ = np.arange(len(losses))
    upper, lower = baselines[rows_, before], baselines[rows_, last]
    drop = np.where(upper > lower, upper - lower, 1.0)
    position = axis[last] - (axis[last] - axis[before]) * (losses - lower) / drop
    tokens = np.exp(position) if baseline.scale == "log" else position
    tokens = np.where(losses > baselines[:, 0], 0.0, tokens)
    return np.where(reached.any(axis=1), tokens, np.inf)


def one_epoch_baseline(table: pd.DataFrame, arm: str, *, scale: Scale = "log") -> Baseline | None:
    """Baseline of an arm of a study: the best size among its finished runs of one epoch.

    Seeds of one configuration are averaged. None where the study has no such run.
    """
    chosen = table[(table["arm"] == arm) & table["final"].astype(bool)]
    chosen = _averaged(chosen[chosen["planned_epochs"] <= 1 + 1e-6])
    if chosen.empty:
        return None
    best = chosen.loc[chosen.groupby("tokens")["loss"].idxmin()].sort_values("tokens")
    return Baseline(
        tokens=tuple(best["tokens"].astype(float)),
        losses=tuple(best["loss"]),
        errors=tuple(best["error"]),
        scale=scale,
        source=f"one-epoch runs of {arm}",
    )


def effective_tokens(
    table: pd.DataFrame,
    *,
    baselines: dict[str, Baseline] | None = None,
    final_only: bool = True,
    scale: Scale = "log",
) -> pd.DataFrame:
    """Curves of effective tokens against epochs, a row for each configuration and length.

    Each arm is measured by its one-epoch runs, or by `baselines` of other origin. Arms without a
    baseline are left out. With `final_only` false intermediate evaluations have rows too.

    Columns: `arm`, `configuration`, `params`, `unique_tokens`, `epochs`, `loss`, `error`,
    `effective_tokens`, `relation`, `low`, `high` and `efficiency`, the tokens over U.
    """
    parts = []
    for arm in table["arm"].unique():
        baseline = (baselines or {}).get(arm) or one_epoch_baseline(table, arm, scale=scale)
        if baseline is None:
            continue
        rows = table[table["arm"] == arm]
        rows = _averaged(rows[rows["final"].astype(bool)] if final_only else rows)
        found = [
            worth(loss, baseline, error=error)
            for loss, error in zip(rows["loss"], rows["error"], strict=True)
        ]
        measured = {
            "effective_tokens": [w.tokens for w in found],
            "relation": [w.relation for w in found],
            "low": [w.low for w in found],
            "high": [w.high for w in found],
        }
        part = rows.assign(**measured)
        parts.append(part.assign(efficiency=part["effective_tokens"] / part["unique_tokens"]))
    if not parts:
        return pd.DataFrame(columns=CURVE_COLUMNS)
    curves = pd.concat(parts, ignore_index=True)
    order = ["arm", "unique_tokens", "configuration", "epochs"]
    return curves.sort_values(order, ignore_index=True)[CURVE_COLUMNS]


_KEYS: Sequence[str] = ("arm", "configuration", "params", "unique_tokens", "tokens")
CURVE_COLUMNS = [
    *("arm", "configuration", "params", "unique_tokens", "epochs", "loss", "error"),
    *("effective_tokens", "relation", "low", "high", "efficiency"),
]


def _averaged(rows: pd.DataFrame) -> pd.DataFrame:
    """Mean loss over the seeds of each configuration at each number of tokens, with its error.

    All runs are measured on the same text, so that only noise and seeds make errors. The error of
    a mean comes from the spread of two seeds or more, and is at least that of the noise draws.
    """
    noise = rows["noise_error"].fillna(rows["standard_error"]).fillna(0.0)
    grouped = rows.assign(noise=noise**2).groupby(list(_KEYS), sort=False)
    mean = grouped.agg(
        epochs=("epochs", "first"),
        loss=("loss", "mean"),
        spread=("loss", "sem"),
        noise=("noise", "mean"),
        seeds=("loss", "size"),
    ).reset_index()
    measured = np.sqrt(mean["noise"] / mean["seeds"])
    return mean.assign(error=np.maximum(mean["spread"].fillna(0.0), measured))
