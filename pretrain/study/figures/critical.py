"""Critical compute against unique tokens: fitted line with its band, closed form, observations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from pretrain.study.figures.chart import Axis, Chart, Drawn, Omitted, Panel, Series
from pretrain.study.figures.style import family_look, quantity

NAME, TITLE = "critical_compute", "Critical compute"


@dataclass(frozen=True)
class CriticalLine:
    """Compute beyond which one family is better than the other, as a function of U."""

    label: str
    unique_tokens: Sequence[float]
    flops: Sequence[float]
    """Infinite or NaN where there is no crossing."""
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    """Ends of the band; infinite where some resamples have no crossing."""
    kind: Literal["numeric", "bound", "closed form", "published", "observed"] = "numeric"
    band: str = ""
    """Meaning of the band, e.g. `90 % of 400 bootstrap resamples`."""


LOOKS: dict[str, tuple[str, Literal["-", "--", ":", ""], Literal["o", "D", "", "*"]]] = {
    "numeric": (family_look("masked").color, "-", ""),
    "bound": ("#8fb0ee", "-", ""),
    "closed form": ("#111827", "--", ""),
    "published": ("#6b7280", ":", ""),
    "observed": ("#111827", "", "D"),
}
"""Colour, line and marker of each kind."""
MEANINGS = {
    "numeric": "Solid: crossing of the fitted laws, solved numerically.",
    "bound": "Pale: the same by the upper bound on the loss, which comes late.",
    "closed form": "Dashed: closed form of their asymptotes.",
    "observed": "Diamonds: measured runs, no law; from that compute on the arm stayed better than "
    "the reference by more than twice the error, both with the lowest loss that they had reached, "
    "also where one was not trained as long. The bar begins at the measured compute before.",
}
"""Sentences of the caption."""


def critical_chart(
    lines: Sequence[CriticalLine],
    *,
    pair: tuple[str, str] = ("masked", "autoregressive"),
    support: tuple[float, float] | None = None,
    likelihood: str = "bound",
    remark: str = "",
) -> Drawn:
    """Chart of the critical compute; `support` is the range of U that the data cover."""
    usable = [line for line in lines if np.isfinite(np.asarray(line.flops, float)).any()]
    if not usable:
        reason = "no crossing of two fitted laws was found: " + (
            remark or "it needs laws of an autoregressive and of a diffusion family"
        )
        return Omitted(NAME, TITLE, reason)
    finite = np.concatenate([_finite(line.flops) for line in usable])
    ceiling = 30 * float(finite.max())
    series = tuple(_series(line, ceiling) for line in usable)
    unique = [u for line in usable for u in line.unique_tokens]
    x = Axis("unique_tokens", "unique tokens U", True, (min(unique) / 1.25, max(unique) * 1.25))
    y = Axis(
        "critical_flops", "critical compute C = 6 N D (FLOPs)", True,
        (float(finite.min()) / 3, 3 * float(finite.max())),
    )  # fmt: skip
    shaded: tuple[tuple[float, float, str], ...] = ()
    title = f"above a line {pair[0]} is better, below it {pair[1]}"
    if support is not None:
        shaded = ((support[0], support[1], "budgets with data"),)
    panel = Panel(title, x, y, series, shaded=shaded)
    caption = _caption(usable, pair, support, likelihood, remark)
    return Chart(NAME, TITLE, caption, (panel,), columns=1, panel_size=(8.4, 4.8))


def _finite(values: Sequence[float]) -> np.ndarray:
    array = np.asarray(values, float)
    return array[np.isfinite(array) & (array > 0)]


def _series(line: CriticalLine, ceiling: float) -> Series:
    """Series with an open band drawn up to `ceiling`, which lies above the panel."""
    color, style, marker = LOOKS[line.kind]
    flops = np.asarray(line.flops, float)
    flops = np.where(np.isfinite(flops), flops, np.nan)
    order = np.argsort(line.unique_tokens, kind="stable")
    low = high = None
    if line.low is not None and line.high is not None:
        low = np.minimum(np.nan_to_num(np.asarray(line.low, float), posinf=ceiling), ceiling)[order]
        high = np.minimum(np.nan_to_num(np.asarray(line.high, float), posinf=ceiling), ceiling)
        high = high[order]
    return Series(
        line.label,
        np.asarray(line.unique_tokens, float)[order],
        flops[order],
        low=low,
        high=high,
        uncertainty="bars" if line.kind == "observed" else "band",
        color=color,
        line=style,
        marker=marker,
        size=6,
        width=2.0 if line.kind == "numeric" else 1.4,
    )


def _caption(
    lines: Sequence[CriticalLine],
    pair: tuple[str, str],
    support: tuple[float, float] | None,
    likelihood: str,
    remark: str,
) -> str:
    kinds = {line.kind for line in lines}
    parts = [
        f"Smallest compute at which the lowest loss of {pair[0]} over all sizes is below that of "
        f"{pair[1]}, on the same unique tokens."
    ]
    parts += [text for kind, text in MEANINGS.items() if kind in kinds]
    parts += [f"{line.label}: band {line.band}." for line in lines if line.band]
    if "numeric" not in kinds:
        parts.append("No laws could be fitted: there is no line.")
    elif all(line.low is None for line in lines if line.kind == "numeric"):
        parts.append("No band: the laws have no resamples, so that the error is not known.")
    if support is None:
        parts.append(
            "The range of data behind the laws is not known." if "numeric" in kinds else ""
        )
    else:
        parts.append(
            f"Data cover {quantity(support[0])} to {quantity(support[1])} unique tokens (grey); "
            "elsewhere the lines are extrapolated."
        )
    if likelihood == "bound":
        parts.append(
            f"The loss of {pair[0]} is an upper bound and that of {pair[1]} exact, so that a true "
            "crossing is earlier than drawn, never later."
        )
    parts.append(
        "Both families have the recipe that was fitted: a better tuned one moves the line. Where "
        "the band leaves the panel some resamples have no crossing at all."
    )
    if remark:
        parts.append(remark)
    return " ".join(part for part in parts if part)
