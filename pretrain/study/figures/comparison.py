"""Figures of finished runs, drawn from their logs alone."""

from __future__ import annotations

from pathlib import Path

from pretrain.study.curves import Curve, Point, crossing, overtaking

COLORS = {"autoregressive": "#c2410c", "masked diffusion": "#1d4ed8"}


def draw_comparison(
    reference: Curve, challenger: Curve, title: str, path: Path, floor: float | None = None
) -> list[Path]:
    """Draw validation loss against epochs and training FLOPs; returns the PNG and the SVG.

    It marks the best point of `reference`, the turn to overfitting if there is one, and the
    crossing if it was reached. `floor` draws ln K, the loss of a uniform prediction.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.4), sharey=True, layout="constrained")
    for axis, field, label in zip(
        axes, ("epoch", "flops"), ("epochs over the same tokens", "training FLOPs"), strict=True
    ):
        for curve in (reference, challenger):
            _draw_curve(axis, curve, field)
        _mark(axis, reference, challenger, field)
        axis.set_xscale("log")
        axis.set_xlabel(label)
        axis.grid(alpha=0.25, which="both", linewidth=0.5)
    values = [p.nats_per_token for c in (reference, challenger) for p in c.points]
    span = max(values) - min(values)
    axes[0].set_ylim(min(values) - 0.2 * span, max(values) + 0.08 * span)
    if floor is not None and floor < max(values) + 0.08 * span:
        for axis in axes:
            axis.axhline(floor, color="gray", linestyle=":", linewidth=1)
    _plain_ticks(axes[0], max(p.epoch for c in (reference, challenger) for p in c.points))
    axes[0].set_ylabel("validation loss (nats per token)")
    axes[0].legend(frameon=False, loc="lower left")
    figure.suptitle(title, fontsize=11)
    paths = [path.with_suffix(".png"), path.with_suffix(".svg")]
    for target in paths:
        figure.savefig(target, dpi=150)
    plt.close(figure)
    return paths


def _draw_curve(axis: object, curve: Curve, field: str) -> None:
    axis.errorbar(  # type: ignore[attr-defined]
        [getattr(p, field) for p in curve.points],
        [p.nats_per_token for p in curve.points],
        yerr=[2 * p.noise_error for p in curve.points],
        label=curve.label,
        color=COLORS.get(curve.label),
        marker="o",
        markersize=3.5,
        linewidth=1.6,
        capsize=2,
    )


def _mark(axis: object, reference: Curve, challenger: Curve, field: str) -> None:
    """Mark the best point of the reference with its level, and the crossing."""
    best = reference.best
    color = COLORS.get(reference.label)
    turned = f"best {best.nats_per_token:.2f} at epoch {best.epoch:.0f}"
    if reference.overfits:
        turned += ",\nthen it overfits"
    axis.axhline(best.nats_per_token, color=color, linestyle="--", linewidth=0.8)  # type: ignore[attr-defined]
    _annotate(axis, best, field, turned, color, (0, -32))
    color, lowest = COLORS.get(challenger.label), challenger.best
    text = f"best {lowest.nats_per_token:.2f}\nat epoch {lowest.epoch:.0f}"
    _annotate(axis, lowest, field, text, color, (-6, -46))
    point = overtaking(challenger, reference)
    if point is not None and field == "flops":
        _annotate(axis, point, field, "lower at the\nsame FLOPs", color, (-62, -30))
    point = crossing(challenger, reference)
    if point is not None:
        text = f"below the best {reference.label}\nfrom epoch {point.epoch:.0f} on"
        _annotate(axis, point, field, text, color, (-10, 38))


def _plain_ticks(axis: object, largest: float) -> None:
    """Label epochs 1, 2, 5, 10, ... instead of powers of ten."""
    ticks = [m * 10**e for e in range(6) for m in (1, 2, 5) if m * 10**e <= largest]
    axis.set_xticks(ticks, labels=[f"{tick:g}" for tick in ticks])  # type: ignore[attr-defined]


def _annotate(
    axis: object, point: Point, field: str, text: str, color: str | None, offset: tuple[int, int]
) -> None:
    axis.annotate(  # type: ignore[attr-defined]
        text,
        (getattr(point, field), point.nats_per_token),
        xytext=offset,
        textcoords="offset points",
        ha="center",
        fontsize=8.5,
        color=color,
        arrowprops={"arrowstyle": "->", "color": color, "linewidth": 0.8},
    )
