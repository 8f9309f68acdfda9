"""The runs that benchmarks/learning_curves.py compares."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """A run: its option in configs/objective, and the look of its curve."""

    option: str
    label: str
    color: str
    style: str = "-"
    overrides: tuple[str, ...] = ()
    drawn: bool = True
    """False: it stands in the table alone."""


CONDITIONED = "model.time_conditioning=true"
UNCONDITIONED = "model.time_conditioning=false"
CROSS_ENTROPY = "objective.loss=cross_entropy"


def control(option: str, label: str, *overrides: str) -> Family:
    """A run that separates causes: each noise under each loss, noise-conditioned or not."""
    return Family(option, label, "gray", "-", overrides, drawn=False)


FAMILIES = {
    "autoregressive": Family("autoregressive", "autoregressive", "#111827"),
    "block": Family("block", "block (4)", "#7c3aed", "-", ("objective.block_size=4",)),
    "masked_simple": Family("masked_simple", "masked (simple)", "#1d4ed8"),
    "masked": Family("masked", "masked (elbo)", "#1d4ed8", "--"),
    "esoteric": Family("esoteric", "esoteric, alpha0 = 1", "#0891b2"),
    "interpolating": Family("interpolating", "interpolating, balanced", "#15803d"),
    "interpolating_uniform": Family(
        "interpolating", "interpolating, uniform", "#c2410c", ":", ("objective.noise=uniform",)
    ),
    "gidd": Family("gidd", "interpolating, GIDD 0.2", "#65a30d"),
    "uniform": Family("uniform", "uniform (elbo)", "#c2410c", "--"),
    "uniform_simple": Family("uniform_simple", "uniform (simple)", "#c2410c"),
    "duo": Family("duo", "uniform, Duo's curriculum", "#f59e0b"),
    "gaussian": Family("gaussian", "gaussian", "#be185d"),
    "balanced_conditioned": control("interpolating", "balanced, noise-conditioned", CONDITIONED),
    "balanced_ce": control("interpolating", "balanced, cross-entropy", CROSS_ENTROPY),
    "balanced_ce_conditioned": control(
        "interpolating",
        "balanced, cross-entropy, noise-conditioned",
        CROSS_ENTROPY,
        CONDITIONED,
    ),
    "interpolating_uniform_conditioned": control(
        "interpolating",
        "interpolating, uniform, noise-conditioned",
        "objective.noise=uniform",
        CONDITIONED,
    ),
    "uniform_unconditioned": control(
        "uniform_simple", "uniform (simple), not noise-conditioned", UNCONDITIONED
    ),
}
