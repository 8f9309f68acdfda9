"""Console output: a progress bar on a terminal, one plain line for each report in a log file.

Training shows loss, gradient norm, learning rate, speed and MFU; results of evaluations are on
separate lines. The remaining time is estimated from the steps of this process alone, so that a
resumed run does not count the hours in which it did not run.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from pretrain.tracking import Status

_SHOWN = (
    ("epoch", lambda v: f"epoch {v:.2f}"),
    ("loss", lambda v: f"loss {v:.4f}"),
    ("grad_norm", lambda v: f"grad {v:.3g}"),
    ("lr", lambda v: f"lr {v:.3g}"),
    ("tokens_per_second", lambda v: f"{_count(v)} tok/s"),
    ("mfu", lambda v: f"MFU {100 * v:.1f} %"),
)
"""Measurements on a training line, in this order; names may have a prefix (`train/loss`)."""
_WARM_UP_REPORTS = 1
"""Reports that the estimate of the remaining time leaves out: first steps compile, fill caches."""


class ConsoleSink:
    """Progress of one run on a terminal or in a log."""

    def __init__(self, *, total_steps: int, start_step: int, stream: IO[str] | None = None) -> None:
        self._stream = stream if stream is not None else sys.stdout
        self._total = total_steps
        self._reports = 0
        self._clock = (time.monotonic(), start_step)
        self._bar: tuple[Progress, TaskID] | None = None
        if self._stream.isatty():
            self._bar = _progress_bar(self._stream, total_steps, start_step)

    def log(self, metrics: Mapping[str, float], step: int, time_s: float) -> None:
        """Show training measurements on the bar or a line, other results on a separate line."""
        shown = {name.rsplit("/", 1)[-1]: v for name, v in metrics.items() if _of_training(name)}
        others = {name: v for name, v in metrics.items() if not _of_training(name)}
        if "loss" in shown:
            self._training_line(shown, step)
        if others:
            values = "  ".join(f"{name} {_number(value)}" for name, value in others.items())
            self.message(f"step {step:,}  {values}")

    def params(self, values: Mapping[str, Any]) -> None:
        """Show properties of the run on one line."""
        self.message("  ".join(f"{k} {_fact(v)}" for k, v in values.items()))

    def artifact(self, path: Path, folder: str) -> None:
        """Do nothing: files are not announced."""

    def message(self, text: str) -> None:
        """Print above the bar."""
        if self._bar is not None:
            self._bar[0].console.print(text, markup=False, highlight=False)
        else:
            print(text, file=self._stream, flush=True)

    def close(self, status: Status) -> None:
        """Stop the bar and restore the terminal."""
        if self._bar is not None:
            self._bar[0].stop()
            self._bar = None

    def _training_line(self, metrics: Mapping[str, float], step: int) -> None:
        parts = [show(metrics[name]) for name, show in _SHOWN if name in metrics]
        left = self._time_left(step)
        if self._bar is not None:
            bar, task = self._bar
            bar.update(task, completed=step, left=left, detail="  ".join(parts))
        else:
            parts += [f"left {left}"] if left else []
            self.message(f"step {step:,}/{self._total:,}  {'  '.join(parts)}")

    def _time_left(self, step: int) -> str:
        self._reports += 1
        started, first = self._clock
        if self._reports <= _WARM_UP_REPORTS:
            self._clock = (time.monotonic(), step)
            return ""
        done = step - first
        if done <= 0:
            return ""
        return _duration((time.monotonic() - started) / done * (self._total - step))


def _progress_bar(stream: IO[str], total: int, done: int) -> tuple[Progress, TaskID]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    bar = Progress(
        TextColumn("step"),
        MofNCompleteColumn(),
        BarColumn(bar_width=20),
        TextColumn("{task.fields[detail]}"),
        TextColumn("left {task.fields[left]}"),
        console=Console(file=stream),
        redirect_stdout=False,  # other ranks and libraries write to the same terminal anyway
        redirect_stderr=False,
        refresh_per_second=2,
    )
    task = bar.add_task("", total=total, completed=done, detail="starting", left="?")
    bar.start()
    return bar, task


def _of_training(name: str) -> bool:
    """True for training measurements, which are printed only where `_SHOWN` names them."""
    return name.rpartition("/")[0] in ("", "train")


def _number(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 1e4 else _count(value)


def _count(value: float) -> str:
    for size, unit in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.1f}{unit}"
    return f"{value:.0f}"


def _duration(seconds: float) -> str:
    minutes, s = divmod(int(seconds + 0.5), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    if days:
        return f"{days}d{h:02d}h"
    return f"{h}:{m:02d}:{s:02d}" if h else f"{m}:{s:02d}"


def _fact(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
