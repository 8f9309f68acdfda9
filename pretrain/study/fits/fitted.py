"""A fitted law: coefficients, their resamples, the range of the data, and where they come from.

It is stored as JSON, so that `epochal study advise` can use fits of any origin.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np

from pretrain.study.fits.laws import LAWS, Law

RANGED = ("params", "tokens", "unique_tokens", "epochs", "flops")
"""Quantities whose range is stored."""


@dataclass(frozen=True)
class Fitted:
    """Law with coefficients."""

    law_name: str
    values: Mapping[str, float]
    """Coefficients by name, in natural units."""
    family: str
    """Objective, e.g. `autoregressive` or `masked`."""
    arm: str = ""
    """Recipe of the runs, e.g. `weight decay 0.1`."""
    likelihood: Literal["exact", "bound"] = "exact"
    """Kind of the fitted losses."""
    resamples: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """Coefficients of bootstrap resamples by name; empty where there are none."""
    support: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """Smallest and largest value of the data, for the names of `RANGED`."""
    diagnostics: Mapping[str, float] = field(default_factory=dict)
    """`objective` (sum of Huber losses), `r2`, `points`, `clusters`, `aic`, `bic`, ..."""
    delta: float = 1e-3
    """Threshold of Huber's loss, in log loss."""
    tied: Mapping[str, str] = field(default_factory=dict)
    """Coefficients that were held equal to another."""
    fixed: tuple[str, ...] = ()
    """Names of the coefficients that were held at their value, e.g. those of an earlier stage."""
    warnings: tuple[str, ...] = ()
    """Known traps that this fit may have fallen into."""
    source: str = ""
    """Origin: a paper, or the study and commit whose table was fitted."""

    @property
    def law(self) -> Law:
        """Form of the law."""
        return LAWS[self.law_name]

    def loss(self, params: Any, tokens: Any, unique: Any) -> np.ndarray:
        """Predicted loss in nats per token."""
        return self.law.loss(self.values, params, tokens, unique)

    def resampled_loss(self, params: Any, tokens: Any, unique: Any) -> np.ndarray:
        """Predicted loss [r, ...] of every resample, for the broadcast shape of the arguments."""
        shape = np.broadcast_shapes(np.shape(params), np.shape(tokens), np.shape(unique))
        values = {
            name: np.asarray(given, float).reshape(-1, *[1] * len(shape))
            for name, given in self.resamples.items()
        }
        return self.law.loss(values, params, tokens, unique)

    def to_dict(self) -> dict[str, Any]:
        """Fields as JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> Fitted:
        """Inverse of `to_dict`; ranges become tuples again."""
        support = {name: (low, high) for name, (low, high) in given.get("support", {}).items()}
        listed = {name: tuple(given.get(name, ())) for name in ("warnings", "fixed")}
        return cls(**{**given, "support": support, **listed})
