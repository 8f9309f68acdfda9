"""Results of the readers: a JSON file, a table in Markdown and a figure."""

from __future__ import annotations

import json
import platform
import sys
from pathlib import Path

LIMIT = "numpy memmap, random"


def write_results(out: Path, results: dict[str, dict[str, float]], missing: dict[str, str]) -> None:
    """Write OUT.md, OUT.json and OUT.png; readers that are `missing` are named with the reason."""
    out.parent.mkdir(parents=True, exist_ok=True)
    limit = _rate(results[LIMIT], "cpu")
    lines = [
        "| reader | Mtok/CPU-s | share of the limit | Mtok/s wall | first batch | peak memory |",
        "|---|---|---|---|---|---|",
    ]
    for name, run in results.items():
        cpu, wall = _rate(run, "cpu"), _rate(run, "wall")
        lines.append(
            f"| {name} | {cpu:.1f} | {cpu / limit:.3f} | {wall:.1f} | "
            f"{run['first'] * 1e3:.0f} ms | {run['peak'] / 1e6:.0f} MB |"
        )
    lines += [f"\n{name} was left out: {reason}" for name, reason in missing.items()]
    out.with_suffix(".md").write_text("\n".join(lines) + "\n")
    about = {"machine": platform.processor() or platform.machine(), "python": sys.version}
    out.with_suffix(".json").write_text(json.dumps({**about, "results": results}, indent=1))
    print("\n".join(lines))
    draw(out.with_suffix(".png"), {name: _rate(run, "cpu") for name, run in results.items()})


def _rate(run: dict[str, float], clock: str) -> float:
    """Million tokens a second of a clock, `cpu` or `wall`."""
    return run["tokens"] / run[clock] / 1e6


def draw(path: Path, rates: dict[str, float]) -> None:
    """Draw million tokens per CPU-second of every reader, as points on a logarithmic axis."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(rates)[::-1]
    figure, axes = pyplot.subplots(figsize=(8, 4))
    axes.axvline(rates[LIMIT], color="0.6", linestyle="--", zorder=0)
    for place, name in enumerate(names):
        colour = "#0072B2" if name.startswith("epochal") else "0.35"
        axes.plot(rates[name], place, "o", color=colour)
        label = f"{rates[name]:.0f}"
        at = (rates[name], place)
        style = {"textcoords": "offset points", "ha": "right", "va": "center"}
        white = {"facecolor": "white", "edgecolor": "none", "pad": 1}
        axes.annotate(label, at, (-8, 0), bbox=white, **style)
    axes.set_yticks(range(len(names)), names)
    axes.set_xscale("log")
    axes.set_xlim(left=min(rates.values()) / 2)
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.set_xlabel("million tokens per CPU-second, batches of 8 x 2048 (dashed: the limit)")
    axes.grid(axis="y", color="0.9")
    axes.set_axisbelow(True)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
