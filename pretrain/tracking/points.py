"""Measurements as trackers get them, and those that `metrics.jsonl` records."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple


class Point(NamedTuple):
    """One measurement."""

    name: str
    value: float
    time_ms: int
    """Milliseconds since 1970; the attempts at a step differ in it."""
    step: int


def points_of(metrics: Mapping[str, float], step: int, time_s: float) -> list[Point]:
    """Points of one report, taken at `time_s` (seconds since 1970)."""
    return [Point(name, value, round(time_s * 1000), step) for name, value in metrics.items()]


def recorded_points(path: Path) -> list[Point]:
    """Points in a `metrics.jsonl`, in order; none where there is no file."""
    from pretrain.tracking.jsonl import read_metrics

    try:
        rows = read_metrics(path)
    except FileNotFoundError:
        return []
    points = []
    for row in rows:
        values = {name: value for name, value in row.items() if name not in ("step", "time")}
        points += points_of(values, int(row["step"]), row["time"])
    return points


def once(points: Iterable[Point]) -> list[Point]:
    """The points, but of each name and step only the first.

    A report of a step and its evaluation share some names, such as `train/epoch`.
    """
    first: dict[tuple[str, int], Point] = {}
    for point in points:
        first.setdefault((point.name, point.step), point)
    return list(first.values())
