"""Crossings that a study measured itself: no law, only its evaluations."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from pretrain.study.early_stopping import noise_errors


@dataclass(frozen=True)
class Observed:
    """Compute from which one arm was better than another at one unique budget."""

    unique_tokens: float
    flops: float
    """Least measured compute from which it stayed better by more than twice the error."""
    low: float
    """Largest measured compute below, where that was not shown."""


def observed_crossings(data: pd.DataFrame, challenger: str, reference: str) -> list[Observed]:
    """Crossings of the lowest losses that two arms reached with at most a compute C = 6 N D.

    An arm keeps its lowest loss at larger compute, as early stopping would. Budgets without a
    crossing have no entry.
    """
    given = data[data["loss"].notna()].assign(error=noise_errors)
    found = []
    for unique, rows in given.groupby("unique_tokens"):
        ours, theirs = (rows[rows["arm"] == arm] for arm in (challenger, reference))
        if ours.empty or theirs.empty:
            continue
        computes = np.unique(np.concatenate([ours["flops_6nd"], theirs["flops_6nd"]]))
        our_loss, our_error = _lowest(ours, computes)
        their_loss, their_error = _lowest(theirs, computes)
        margin = 2 * np.nan_to_num(np.hypot(our_error, their_error))
        with np.errstate(invalid="ignore"):
            better = (our_loss < their_loss - margin) & np.isfinite(their_loss)
        at = len(better) - int(np.argmin(better[::-1])) if not better.all() else 0
        if 0 < at < len(better):
            found.append(Observed(float(unique), float(computes[at]), float(computes[at - 1])))
    return found


def _lowest(rows: pd.DataFrame, computes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lowest loss with at most each compute, infinite where there is none, and its error."""
    ordered = rows.sort_values(["flops_6nd", "loss"])
    losses = ordered["loss"].to_numpy(float)
    lowest = np.minimum.accumulate(losses)
    holder = np.maximum.accumulate(np.where(losses == lowest, np.arange(len(losses)), 0))
    at = np.searchsorted(ordered["flops_6nd"].to_numpy(float), computes, side="right") - 1
    known = at >= 0
    chosen = holder[np.maximum(at, 0)]
    errors = ordered["error"].to_numpy(float)
    return np.where(known, losses[chosen], np.inf), np.where(known, errors[chosen], 0.0)
