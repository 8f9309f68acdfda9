"""Measured rows as Markdown tables, with everything that their figures depend on.

    python benchmarks/gpu_day/table.py rows.json

Free of torch, so that it also prints what a run left that was stopped.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

DENSE_TFLOPS = 989.0
"""Dense bfloat16 rate of an H100 SXM or H200 by the data sheet; 1,979 is that with sparsity."""
COLUMNS = (
    "model", "objective", "micro-batch", "recompute", "compiled", "tokens/s", "TFLOP/s",
    "of 989", "of burst", "of sustained", "peak GiB", "corruption ms",
)  # fmt: skip


def table(found: dict[str, Any]) -> str:
    """Rows that were measured, their time by class of kernels, and the rows that failed."""
    lines = [
        f"{found['device']}, torch {found['torch']}, commit {found['commit']}",
        f"bfloat16, one device, sequence {found['length']:,}, vocabulary {found['vocabulary']:,}",
        f"denominators: {DENSE_TFLOPS:.0f} TFLOP/s dense by the data sheet; square products of "
        f"this run {found['burst_tflops']:.1f} TFLOP/s in a burst, "
        f"{found['sustained_tflops']:.1f} sustained",
    ]
    if not found["cudnn"]:
        lines.append("cuDNN's attention was switched off after an error")
    measured = [row for row in found["rows"] if "seconds" in row]
    if measured:
        lines += ["", _line(COLUMNS), "|---" * len(COLUMNS) + "|"]
        lines += [_line(_cells(row, found)) for row in measured]
    profiled = [row for row in measured if "kernels" in row]
    if profiled:
        lines += ["", "| row | device time by class of kernels |", "|---|---|"]
        for row in profiled:
            shares = ", ".join(f"{kind} {share:.0%}" for kind, share in row["kernels"].items())
            lines.append(_line((row["label"], shares)))
    lines += [""] + [
        f"{row['label']}: {kind}: {row[kind]}"
        for row in found["rows"]
        for kind in ("error", "profile_error", "skipped")
        if kind in row
    ]
    return "\n".join(lines)


def _line(cells: tuple[str, ...]) -> str:
    return "| " + " | ".join(cells) + " |"


def _cells(row: dict[str, Any], found: dict[str, Any]) -> tuple[str, ...]:
    compiled = [name for name, key in (("layers", "compile"), ("loss", "compile_loss")) if row[key]]
    rate, times = row["tflops"], row["accumulate"]
    return (
        row["model"],
        row["objective"],
        f"{row['micro_batch']}" + (f" x {times}" if times > 1 else ""),
        row["recompute"],
        ", ".join(compiled) or "no",
        f"{row['tokens_per_second']:,.0f}",
        f"{rate:.1f}",
        f"{rate / DENSE_TFLOPS:.1%}",
        f"{rate / found['burst_tflops']:.1%}",
        f"{rate / found['sustained_tflops']:.1%}",
        f"{row['peak_gib']:.1f}",
        f"{row['corruption_seconds'] * 1e3:.1f}",
    )


if __name__ == "__main__":
    print(table(json.loads(Path(sys.argv[1]).read_text())))
