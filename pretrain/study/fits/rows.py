"""Choice of the rows of a study's table that a law is fitted to.

Nothing is dropped silently: every rule states what it left out, with a count, and the sentences
become warnings of the fit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd

from pretrain.errors import ConfigError
from pretrain.study.fits.cautions import rising
from pretrain.study.fits.fit import fit_law
from pretrain.study.fits.fitted import Fitted
from pretrain.study.fits.laws import LAWS

Pick = Literal["final", "best"]
"""Evaluation that stands for a run: after the whole schedule, or the lowest (early stopping)."""


@dataclass(frozen=True)
class Rows:
    """Rows for a fit, and sentences on those that were left out."""

    table: pd.DataFrame
    notes: tuple[str, ...]


def choose_rows(
    table: pd.DataFrame, law: str, *, arm: str | None = None, pick: Pick = "final"
) -> Rows:
    """Rows of a study's table (columns of `pretrain.study.table`) for one law and arm.

    One row a run is taken. Single-epoch laws get rows without repeated tokens. Monotone laws get
    no overfitted rows, which they cannot describe.

    Raises:
        ConfigError: An unknown arm, or no row left.
    """
    if arm is not None:
        known = sorted(set(table["arm"]))
        if arm not in known:
            raise ConfigError(f"no arm {arm!r} in the table; it has {', '.join(known)}")
        table = table[table["arm"] == arm]
    notes: list[str] = []
    finite = table["loss"].notna()
    if not finite.all():
        notes.append(f"{int((~finite).sum())} rows without a loss were left out")
        table = table[finite]
    if pick == "final":
        rows = table[table["final"].astype(bool)]
        unfinished = table["run"].nunique() - rows["run"].nunique()
        if unfinished:
            notes.append(f"{unfinished} runs without an evaluation at their end were left out")
    else:
        rows = table.loc[table.groupby("run")["loss"].idxmin()]
        notes.append(
            "each run is represented by its lowest loss (early stopping), which the choice among "
            "noisy evaluations makes slightly too low"
        )
    if law == "single_epoch":
        fresh = rows["tokens"] <= 1.01 * rows["unique_tokens"]
        if not fresh.all():
            notes.append(f"{int((~fresh).sum())} rows with repeated tokens were left out")
        rows = rows[fresh]
    if LAWS[law].monotone:
        marked = rising(rows)
        if marked.any():
            notes.append(
                f"{int(marked.sum())} of {len(rows)} rows were left out as overfitted: fewer "
                "tokens of the same size and budget gave a lower loss, which the law "
                f"{law} cannot describe"
            )
        rows = rows[~marked]
    if rows.empty:
        raise ConfigError("no row is left for the fit: " + "; ".join(notes))
    return Rows(rows.reset_index(drop=True), tuple(notes))


def fit_study(
    table: pd.DataFrame,
    law: str,
    *,
    arm: str | None = None,
    pick: Pick = "final",
    **options: Any,
) -> Fitted:
    """Law fitted to the chosen rows of a study's table; `options` are those of `fit_law`."""
    rows = choose_rows(table, law, arm=arm, pick=pick)
    if "source" not in options and "study" in rows.table:
        options["source"] = "study " + ", ".join(sorted(set(rows.table["study"].astype(str))))
    return fit_law(rows.table, law, notes=rows.notes, **options)
