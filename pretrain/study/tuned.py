"""Settings that an arm was tuned over: axes beside size, unique tokens, length and seed.

An arm may have a grid of its own, e.g. of weight decays. Its result is that of the best setting, so
that curves stay with one setting, and laws are fitted to the best one at each point.
"""

from __future__ import annotations

import pandas as pd

from pretrain.study.table import COLUMNS

NO_SETTINGS = {"data.epochs", "data.unique_tokens", "flops_budget", "run.seed", "model"}
"""Axes that make points of one recipe."""
POINT = ["params", "unique_tokens", "planned_epochs"]


def settings(table: pd.DataFrame) -> pd.Series:
    """Values of the tuned axes of each row as one text; empty where there are none."""
    axes = [name for name in table.columns if name not in COLUMNS and name not in NO_SETTINGS]
    found = pd.Series("", index=table.index, dtype="str")
    for name in axes:
        given = table[name]
        found += given.map(lambda value, name=name: f"{name}={value} ").where(given.notna(), "")
    return found.str.strip()


def best_settings(rows: pd.DataFrame) -> tuple[pd.DataFrame, str]:
    """Runs of the best setting at each size, budget and length; a sentence where others are left.

    The best one has the lowest mean loss over its seeds at the ends of schedules.
    """
    named = rows.assign(setting=settings(rows))
    if named["setting"].nunique() < 2:
        return rows, ""
    ends = named[named["final"].fillna(False).astype(bool) & named["loss"].notna()]
    means = ends.groupby([*POINT, "setting"])["loss"].mean().reset_index()
    best = means.loc[means.groupby(POINT)["loss"].idxmin(), [*POINT, "setting"]]
    kept = named.merge(best, on=[*POINT, "setting"])
    dropped = ends["run"].nunique() - kept["run"].nunique()
    if not dropped:
        return rows, ""
    note = (
        f"{dropped} of {ends['run'].nunique()} runs were left out: at their size, budget and "
        "length another setting of the tuned keys had a lower loss, and the lowest of several is "
        "slightly too low"
    )
    return kept.drop(columns="setting"), note
