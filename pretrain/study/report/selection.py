"""Choice among the laws of an arm: by held-out prediction, then by information criterion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from pretrain.errors import ConfigError
from pretrain.study.fits.fitted import Fitted
from pretrain.study.fits.laws import LAWS
from pretrain.study.fits.selection import compare_laws
from pretrain.study.report.html import paragraph, table

BASELINE = "single_epoch"
"""Law that takes repeats for fresh tokens: others must predict better, it is not chosen."""
ALIKE = 1.05
"""Ratio of held-out errors up to which the information criterion decides."""


@dataclass(frozen=True)
class Selection:
    """Laws of one arm compared on the same rows."""

    arm: str
    compared: pd.DataFrame | None
    """Table of `compare_laws`; None where the data do not support it."""
    chosen: str | None
    """Name of the law that the report goes on with; None where the arm has none."""
    reason: str = ""
    """Reason why nothing was compared."""

    @property
    def beaten_by_baseline(self) -> bool:
        """True where repeats counted as fresh tokens predict better than the chosen law."""
        if self.compared is None:
            return False
        errors = self.compared.set_index("candidate")["folds_error"]
        return bool(self.chosen in errors and errors[BASELINE] < errors[self.chosen])


def select_law(arm: str, rows: pd.DataFrame, fits: Mapping[str, Fitted]) -> Selection:
    """Comparison of the fitted laws of an arm on `rows`, all ends of its schedules.

    With one law there is nothing to choose, but its held-out error stands beside the baseline's.
    """
    first = next(iter(fits), None)
    if first is None:
        return Selection(arm, None, None, "no law of repeated tokens was fitted")
    candidates = {
        name: {"law": name, "starts": [fitted.values], "check": False}
        for name, fitted in fits.items()
    }
    try:
        _require(rows)
        found = compare_laws(rows, {BASELINE: {"law": BASELINE, "check": False}, **candidates})
    except (ConfigError, np.linalg.LinAlgError) as error:
        return Selection(arm, None, first, str(error))
    eligible = found[found["candidate"] != BASELINE]
    alike = eligible[eligible["folds_error"] <= ALIKE * eligible["folds_error"].min()]
    return Selection(arm, found, str(alike.loc[alike["bic"].idxmin(), "candidate"]))


def _require(rows: pd.DataFrame) -> None:
    """Raise ConfigError where a fit without a fifth of the configurations would be no test."""
    count = rows["configuration"].nunique()
    needed = 2 * len(LAWS["data_constrained"].coefficients)
    if count < needed:
        raise ConfigError(
            f"{count} configurations; a held-out test of laws with 7 coefficients needs {needed}"
        )


def selection_table(selections: Sequence[Selection]) -> str:
    """Held-out errors and criteria of every law of every arm, the chosen one marked."""
    rows = []
    for item in selections:
        for row in [] if item.compared is None else item.compared.itertuples():
            rows.append(
                (
                    item.arm,
                    row.candidate.replace("_", " "),
                    row.coefficients,
                    f"{100 * row.folds_error:.2f} %",
                    f"{100 * row.largest_error:.2f} %",
                    f"{100 * row.largest_bias:+.2f} %",
                    f"{row.aic:.1f}",
                    f"{row.bic:.1f}",
                    "chosen" if row.candidate == item.chosen else
                    "baseline" if row.candidate == BASELINE else "",
                )
            )  # fmt: skip
    parts = [table(HEADERS, rows, CAPTION)] if rows else []
    parts += [paragraph(text) for text in _sentences(selections)]
    return "".join(parts)


def _sentences(selections: Sequence[Selection]) -> list[str]:
    """Arms whose laws could not be compared, and those whose choice is doubtful."""
    found = []
    for item in selections:
        if item.compared is None and item.chosen is not None:
            law = item.chosen.replace("_", " ")
            found.append(f"{item.arm}: laws are not compared ({item.reason}); {law} law is used.")
        elif item.beaten_by_baseline:
            found.append(
                f"{item.arm}: the law that takes repeats for fresh tokens predicts held-out runs "
                "better than the chosen one: these data do not identify the value of repeats."
            )
    return found


HEADERS = (
    "arm", "law", "coefficients", "held-out error", "largest compute held out", "its bias", "AIC",
    "BIC", "",
)  # fmt: skip
CAPTION = (
    "Laws on the same rows: all ends of schedules, overfitted ones included. Held-out error: mean "
    "absolute error of the predicted loss over five parts of the configurations, each predicted by "
    "a fit to the others. Next to it the error and its bias for the fifth of the configurations "
    "with the largest compute, predicted from the rest. Chosen: the lowest held-out error; of "
    "errors within 5 % of it the lower BIC. The single-epoch law takes repeats for fresh tokens. "
    "The coupled law is left out, as it knows early-stopped runs only. AIC and BIC are for Laplace "
    "errors."
)
