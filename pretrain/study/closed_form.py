"""Closed form of the critical compute, and its error against the crossing of the full laws.

Near the crossing the reference is at the plateau of its repeats, E + K U^-beta, and the challenger
still improves with compute as if all its tokens were fresh. Setting these two equal gives
C = 6 [F / (E_ref - E_ch + K U^-beta)]^((alpha + beta)/(alpha beta)).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from pretrain.study.critical import coefficients, crossing, pair
from pretrain.study.fits.fitted import Fitted
from pretrain.study.fits.laws import DataConstrained, SingleEpoch, Values, balance


def closed_form(
    challenger: Fitted,
    reference: Fitted,
    unique: Any,
    *,
    include_entropy: bool = True,
    resampled: bool = False,
) -> np.ndarray:
    """Critical compute in FLOPs for `unique` tokens, [...] or of all resamples [r, ...].

    Infinite where the plateau of the reference lies below the challenger's entropy. The
    reference has a data-constrained law, the challenger that or a single-epoch law.
    """
    if not isinstance(reference.law, DataConstrained) or not isinstance(
        challenger.law, SingleEpoch
    ):
        raise ValueError(
            f"the closed form is for data-constrained laws, not {challenger.law_name} against "
            f"{reference.law_name}; take the numeric crossing"
        )
    unique = np.asarray(unique, float)
    fits = pair(challenger, reference, include_entropy=include_entropy, resampled=resampled)
    ours, theirs = (coefficients(fitted, unique.ndim) for fitted in fits)
    gap = theirs["E"] - ours["E"] + plateau(theirs) * unique ** -theirs["beta"]
    exponent = (ours["alpha"] + ours["beta"]) / (ours["alpha"] * ours["beta"])
    with np.errstate(divide="ignore", invalid="ignore"):
        flops = 6 * (compute_factor(ours) / gap) ** exponent
    return np.where(gap > 0, flops, np.inf)


def plateau(values: Values) -> Any:
    """K of the loss E + K U^-beta that a data-constrained law reaches with unlimited compute."""
    alpha, beta = values["alpha"], values["beta"]
    size = beta / alpha * (1 + values["R_N"]) ** -alpha
    return values["B"] * (size + (1 + values["R_D"]) ** -beta)


def compute_factor(values: Values) -> Any:
    """F of the loss E + F (C/6)^(-alpha beta/(alpha + beta)), the best one for fresh tokens."""
    gain = balance(values)
    return values["A"] * gain ** -values["alpha"] + values["B"] * gain ** values["beta"]


def closed_form_errors(challenger: Fitted, reference: Fitted, unique: Any) -> pd.DataFrame:
    """Critical compute of the full laws and of the closed form for each of `unique` tokens.

    Columns: `unique_tokens`, `include_entropy`, `numeric`, `closed_form` and their `ratio`.
    """
    parts = []
    for include_entropy in (True, False):
        exact = crossing(challenger, reference, unique, include_entropy=include_entropy)
        approximate = closed_form(challenger, reference, unique, include_entropy=include_entropy)
        with np.errstate(invalid="ignore"):
            ratio = approximate / exact
        columns = {"numeric": exact, "closed_form": approximate, "ratio": ratio}
        part = pd.DataFrame({"unique_tokens": np.asarray(unique, float), **columns})
        part.insert(1, "include_entropy", include_entropy)
        parts.append(part)
    return pd.concat(parts, ignore_index=True)
