"""Look of all figures: one colour and marker a family, plain ticks, fonts that can be read.

Families differ in colour and in marker, recipes of a family in lightness and filling, so that a
print in grey can be read as well. Colours are distinguishable with the common colour blindnesses.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd

Marker = Literal["o", "s", "^", "D", "v", "*", "x", ""]

FAMILIES: dict[str, tuple[str, Marker]] = {
    "autoregressive": ("#c2410c", "o"),
    "masked": ("#1d4ed8", "s"),
    "uniform": ("#047857", "^"),
    "interpolating": ("#7e22ce", "D"),
    "block": ("#0e7490", "v"),
    "esoteric": ("#a16207", "^"),
}
"""Colour and marker of the usual families."""
SPARE: tuple[tuple[str, Marker], ...] = (("#334155", "v"), ("#be185d", "D"), ("#4d7c0f", "^"))
"""Colours and markers of other families, in the order of the table."""
FONT_SIZE = 9.5
SMALLEST_FONT = 8.5
RC: Any = {
    "font.size": FONT_SIZE,
    "axes.titlesize": 10,
    "axes.labelsize": FONT_SIZE,
    "xtick.labelsize": SMALLEST_FONT,
    "ytick.labelsize": SMALLEST_FONT,
    "legend.fontsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "svg.hashsalt": "epochal",
    "svg.fonttype": "path",
}
"""Settings of matplotlib; with the fixed salt the same figure is the same file."""
SUFFIXES = ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e3, " k"))


@dataclass(frozen=True)
class Look:
    """Colour and marker of an arm."""

    color: str
    marker: Marker
    filled: bool


def family_look(family: str, others: Sequence[str] = ()) -> Look:
    """Look of a family; `others` are the unusual families of the study in a fixed order."""
    if family in FAMILIES:
        return Look(*FAMILIES[family], True)
    unusual = [name for name in others if name not in FAMILIES]
    at = unusual.index(family) if family in unusual else 0
    return Look(*SPARE[at % len(SPARE)], True)


def arm_looks(table: pd.DataFrame) -> dict[str, Look]:
    """Look of each arm of a table: the first recipe of a family filled, later ones lighter."""
    arms = table[["arm", "family"]].drop_duplicates().sort_values(["family", "arm"])
    families = list(dict.fromkeys(arms["family"]))
    seen: dict[str, int] = {}
    looks = {}
    for arm, family in zip(arms["arm"], arms["family"], strict=True):
        at = seen.setdefault(family, 0)
        seen[family] += 1
        base = family_look(family, families)
        looks[arm] = Look(_lighter(base.color, at), base.marker, at % 2 == 0)
    return looks


def _lighter(color: str, steps: int) -> str:
    """Colour mixed with white; every step removes 40 % of what is left to it."""
    keep = 0.6**steps
    channels = [int(color[at : at + 2], 16) for at in (1, 3, 5)]
    return "#" + "".join(f"{round(255 - keep * (255 - c)):02x}" for c in channels)


def quantity(value: float) -> str:
    """Short text of a count: 100 k, 1.5 M, 20 B; powers of ten beyond."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    if 1e-3 <= abs(value) < 1e4:
        return f"{value:.3g}" if value < 1000 else f"{value:.0f}"
    for size, suffix in SUFFIXES:
        if size <= abs(value) < 1e15 and abs(value) / size < 1e4:
            return f"{value / size:.3g}{suffix}"
    return power(value)


def power(value: float) -> str:
    """Value as a power of ten in plain characters: 2×10¹⁸."""
    exponent = math.floor(math.log10(abs(value)) + 1e-12)
    mantissa = f"{value / 10**exponent:.3g}"
    digits = str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"10{digits}" if mantissa == "1" else f"{mantissa}\N{MULTIPLICATION SIGN}10{digits}"


def log_ticks(low: float, high: float, at_most: int = 7) -> list[float]:
    """Round values between two positive ends: 1, 2, 5, 10, or decades where those are too many."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    inside: list[float] = []
    for mantissas in ((1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9), (1, 2, 3, 5), (1, 2, 5), (1, 3), (1,)):
        every = [m * 10.0**e for e in range(first, last + 1) for m in mantissas]
        inside = [v for v in every if low * (1 - 1e-9) <= v <= high * (1 + 1e-9)]
        if len(inside) <= at_most:
            return inside
    return inside[:: math.ceil(len(inside) / at_most)]


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Positions as near as possible to the wanted ones, `gap` apart and inside the ends."""
    order = sorted(range(len(wanted)), key=lambda i: (wanted[i], i))
    placed = [0.0] * len(wanted)
    floor = low
    for i in order:
        placed[i] = max(wanted[i], floor)
        floor = placed[i] + gap
    ceiling = high
    for i in reversed(order):
        placed[i] = min(placed[i], ceiling)
        ceiling = placed[i] - gap
    return placed
