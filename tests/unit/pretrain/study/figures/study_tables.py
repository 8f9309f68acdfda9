"""Tidy tables of a study from known curves."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

ROW = {"study": "synthetic", "step": 1, "standard_error": 0.01, "bits_per_byte": 1.5}


def row(arm: str, family: str, unique: float, epochs: float, loss: float, **other: object) -> dict:
    """One evaluation; `other` replaces values."""
    params = float(other.pop("params", 1e6))  # type: ignore[arg-type]
    seed = int(other.pop("seed", 0))  # type: ignore[call-overload]
    configuration = f"{arm}-{unique:g}-{params:g}-{other.pop('length', '')}"
    exact = family == "autoregressive"
    return (
        ROW
        | {
            "run": f"{configuration}-{seed}",
            "arm": arm,
            "family": family,
            "likelihood": "exact" if exact else "bound",
            "seed": seed,
            "configuration": configuration,
            "params": params,
            "params_non_embedding": params / 2,
            "unique_tokens": unique,
            "tokens": unique * epochs,
            "epochs": epochs,
            "planned_epochs": 100.0,
            "final": False,
            "flops": 7 * params * unique * epochs,
            "flops_6nd": 6 * params * unique * epochs,
            "loss": loss,
            "noise_error": 0.0 if exact else 0.01,
        }
        | other
    )


def curves(budgets: Sequence[float] = (1e5, 1e6), seeds: Sequence[int] = (0,)) -> pd.DataFrame:
    """Two arms of one size: AR turns at epoch 8, masked falls to the end."""
    rows = []
    for unique in budgets:
        shift = -0.3 * np.log10(unique / 1e5)
        for seed in seeds:
            for epochs, ar, masked in (
                (2, 5.5, 6.0),
                (8, 5.0, 5.5),
                (32, 5.2, 5.1),
                (100, 5.8, 4.9),
            ):
                common = {"seed": seed, "final": epochs == 100}
                offset = shift + 0.02 * seed
                rows.append(row("ar", "autoregressive", unique, epochs, ar + offset, **common))
                rows.append(row("mdm", "masked", unique, epochs, masked + offset, **common))
    return pd.DataFrame(rows)
