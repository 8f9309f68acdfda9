"""`metrics.jsonl`: one object a line, always written, readable during the run.

Every line reaches the kernel before `log` returns, so that a killed process loses none. On resume
the lines after the checkpoint are dropped, because these steps are made again. So the file of an
interrupted run has the steps of an uninterrupted one, each once.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pretrain.tracking import Status


class JsonlSink:
    """Sink that appends `{"step": ..., "time": ..., name: value, ...}` to one file."""

    def __init__(self, path: Path, keep_to_step: int) -> None:
        """Open `path`, keeping only the complete lines of steps up to `keep_to_step`."""
        path.parent.mkdir(parents=True, exist_ok=True)
        _truncate(path, keep_to_step)
        self._file = path.open("ab", buffering=0)

    def log(self, metrics: Mapping[str, float], step: int, time_s: float) -> None:
        """Append one line; numbers that JSON cannot write become "nan", "inf", "-inf"."""
        row: dict[str, float | str] = {"step": step, "time": round(time_s, 3)}
        row |= {k: v if math.isfinite(v) else str(v) for k, v in metrics.items()}
        line = json.dumps(row).encode() + b"\n"
        if self._file.write(line) != len(line):  # a full disk may take a part of it
            raise OSError(f"{self._file.name}: only a part of a line was written (disk full?)")

    def params(self, values: Mapping[str, Any]) -> None:
        """Do nothing: the settings are in config.yaml."""

    def artifact(self, path: Path, folder: str) -> None:
        """Do nothing: the artifacts are in the run folder."""

    def message(self, text: str) -> None:
        """Do nothing: the console shows messages."""

    def close(self, status: Status) -> None:
        """Close the file."""
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Read the measurements in `path`, in order; a truncated last line is left out."""
    return [row for row, _ in _complete_lines(path)]


def _complete_lines(path: Path) -> Iterator[tuple[dict[str, float], bytes]]:
    with path.open("rb") as file:
        for line in file:
            try:
                row = json.loads(line) if line.endswith(b"\n") else None
                numbers = {k: float(v) for k, v in row.items()} if isinstance(row, dict) else {}
            except (ValueError, TypeError, OverflowError, RecursionError):
                continue
            if "step" in numbers:
                yield numbers, line


def _truncate(path: Path, keep_to_step: int) -> None:
    """Drop later and incomplete lines by replacing the file as a whole."""
    if not path.exists():
        return
    kept = [line for row, line in _complete_lines(path) if row["step"] <= keep_to_step]
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_bytes(b"".join(kept))
    os.replace(partial, path)
