"""Validation curves of finished runs, and comparisons of two curves.

Two measurements count as different only where the difference exceeds twice its error. Both runs are
measured on the same text, so that only the noise of the bound adds to the error, not the choice of
sequences.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Point:
    """One evaluation of a run."""

    epoch: float
    flops: float
    nats_per_token: float
    noise_error: float
    """Standard error of the bound's noise draws, 0 for an exact likelihood; where a single draw
    leaves it unknown, that of text and noise together, which is larger."""
    bits_per_byte: float


@dataclass(frozen=True)
class Curve:
    """Evaluations of one run in the order of training."""

    label: str
    points: tuple[Point, ...]

    @property
    def best(self) -> Point:
        """Evaluation with the lowest loss."""
        return min(self.points, key=lambda p: p.nats_per_token)

    @property
    def overfits(self) -> bool:
        """True where the last evaluation is worse than the best by more than twice their error."""
        last, best = self.points[-1], self.best
        error = (last.noise_error**2 + best.noise_error**2) ** 0.5
        return last.nats_per_token > best.nats_per_token + 2 * error


def read_curve(run: Path, label: str) -> Curve:
    """Read the curve in `RUN/metrics.jsonl`."""
    points = []
    for line in (run / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        if "validation/nats_per_token" in record:
            points.append(
                Point(
                    epoch=record["train/epoch"],
                    flops=record["train/flops"],
                    nats_per_token=record["validation/nats_per_token"],
                    noise_error=_noise_error(record),
                    bits_per_byte=record["validation/bits_per_byte"],
                )
            )
    return Curve(label, tuple(points))


def _noise_error(record: dict[str, float]) -> float:
    """Noise error of an evaluation, or the smallest error that it gives and that covers it."""
    for name in ("noise_error", "standard_error"):
        if f"validation/{name}" in record:
            return record[f"validation/{name}"]
    return math.inf


def overtaking(challenger: Curve, reference: Curve) -> Point | None:
    """First evaluation of `challenger` below `reference` at the same training FLOPs, else None.

    The reference is interpolated in log FLOPs and not extrapolated. This compares runs without
    early stopping, at the same compute.
    """
    flops = [math.log(p.flops) for p in reference.points]
    for point in challenger.points:
        at = math.log(point.flops)
        if not flops[0] <= at <= flops[-1]:
            continue
        nats = [p.nats_per_token for p in reference.points]
        error = max(p.noise_error for p in reference.points)
        error = (point.noise_error**2 + error**2) ** 0.5
        if point.nats_per_token < float(np.interp(at, flops, nats)) - 2 * error:
            return point
    return None


def crossing(challenger: Curve, reference: Curve) -> Point | None:
    """First evaluation of `challenger` below the best one of `reference`, else None.

    "Below" means by more than twice the noise error. The reference takes its best value, so that
    training it for longer after it has overfitted would not help it.
    """
    best = reference.best
    for point in challenger.points:
        error = (point.noise_error**2 + best.noise_error**2) ** 0.5
        if point.nats_per_token < best.nats_per_token - 2 * error:
            return point
    return None
