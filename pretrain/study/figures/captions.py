"""Sentences that captions share: number of runs, kind of likelihood, errors, limits."""

from __future__ import annotations

import pandas as pd

from pretrain.study.early_stopping import noise_errors

ERRORS = (
    "Error bars are twice the standard error of the noise draws of the bound (of the spread over "
    "seeds where that is larger); an exact likelihood has none. The choice of validation text is "
    "common to all runs and not in them."
)


def counts(table: pd.DataFrame) -> str:
    """Number of runs, evaluations and seeds."""
    runs, seeds = table["run"].nunique(), table["seed"].nunique()
    text = (
        f"{runs} {plural('run', runs)} with {len(table)} {plural('evaluation', len(table))}; "
        f"{seeds} {plural('seed', seeds)}."
    )
    if seeds == 1:
        text += " With one seed the variation from run to run is not known."
    unknown = int((noise_errors(table) == float("inf")).sum())
    if unknown:
        text += f" {unknown} {plural('evaluation', unknown)} without a known error."
    return text


def likelihoods(table: pd.DataFrame) -> str:
    """Kind of likelihood of each family."""
    parts = []
    for family, group in table.groupby("family"):
        kinds = sorted(set(group["likelihood"]))
        words = {"exact": "an exact likelihood", "bound": "an upper bound"}
        parts.append(f"{family}: {' or '.join(words.get(kind, kind) for kind in kinds)}")
    text = "Losses are those of the validation text in nats per token (" + "; ".join(parts) + ")."
    if table["likelihood"].nunique() > 1:
        text += (
            " A bound is compared with an exact value, so that the family with the bound may be "
            "better than shown, never worse beyond the errors."
        )
    return text


def plural(noun: str, count: int) -> str:
    """Noun for a count."""
    return noun if count == 1 else f"{noun}s"
