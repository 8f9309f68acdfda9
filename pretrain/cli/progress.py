"""Progress of a long job: bars on a terminal, a line every few seconds in a log."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any


def format_amount(value: float) -> str:
    """Format a number with its decimal prefix, e.g. 12.3M."""
    for factor, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.1f}{letter}"
    return f"{value:.0f}"


class LogProgress:
    """Progress as a line when a stage begins, every few seconds, and when it ends."""

    def __init__(self, interval: float = 5.0) -> None:
        self._interval = interval
        self._stage = ""

    def __enter__(self) -> LogProgress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self._finish()

    def start(self, stage: str, total: int | None, unit: str) -> None:
        """Begin a stage."""
        self._finish()
        self._stage, self._total, self._unit = stage, total, unit
        self._done, self._sums = 0, dict[str, float]()
        self._began = self._shown = time.monotonic()
        self._line("")

    def advance(self, amount: int, **rates: float) -> None:
        """Count `amount` more units as done; `rates` are further amounts to show per second."""
        self._done += amount
        for key, value in rates.items():
            self._sums[key] = self._sums.get(key, 0.0) + value
        if time.monotonic() - self._shown >= self._interval:
            self._shown = time.monotonic()
            self._line(self.describe())

    def note(self, text: str) -> None:
        """Print a line that stays."""
        print(text, file=sys.stderr, flush=True)

    def describe(self) -> str:
        """Describe the amount done, the rates per second and the remaining time."""
        elapsed = max(time.monotonic() - self._began, 1e-9)
        of = f"/{format_amount(self._total)}" if self._total else ""
        parts = [f"{format_amount(self._done)}{of} {self._unit}"] if self._unit else []
        parts += [f"{format_amount(v / elapsed)} {k}/s" for k, v in self._sums.items()]
        if self._total and 0 < self._done < self._total:
            left = elapsed * (self._total - self._done) / self._done
            parts.append(f"{left:.0f} s left")
        return ", ".join(parts)

    def _finish(self) -> None:
        if self._stage:
            seconds, amounts = time.monotonic() - self._began, self.describe()
            self._line(f"done in {seconds:.1f} s" + (f" ({amounts})" if amounts else ""))
        self._stage = ""

    def _line(self, text: str) -> None:
        self.note(f"{self._stage}: {text}" if text else f"{self._stage} ...")


class BarProgress(LogProgress):
    """Progress as one bar for each stage."""

    def __enter__(self) -> BarProgress:
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        self._bars: Any = Progress(
            TextColumn("{task.description:32}"),
            BarColumn(),
            TextColumn("{task.fields[state]}"),
            TimeElapsedColumn(),
        )
        self._bars.start()
        self._task: Any = None
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        super().__exit__(kind, error, trace)
        self._bars.stop()

    def start(self, stage: str, total: int | None, unit: str) -> None:
        """Begin a stage."""
        super().start(stage, total, unit)
        self._task = self._bars.add_task(stage, total=total, state="")

    def advance(self, amount: int, **rates: float) -> None:
        """Count `amount` more units as done; `rates` are further amounts to show per second."""
        super().advance(amount, **rates)
        self._bars.update(self._task, advance=amount, state=self.describe())

    def note(self, text: str) -> None:
        """Print a line above the bars."""
        self._bars.console.print(text)

    def _finish(self) -> None:
        if self._stage:
            done = self._total if self._total is not None else 1
            self._bars.update(self._task, total=done, completed=done, state=self.describe())
        self._stage = ""

    def _line(self, text: str) -> None:
        """Do nothing: the bar shows it."""


def make_progress(*, quiet: bool) -> LogProgress:
    """Make bars for a terminal or lines for a log; with `quiet` only the ends of stages."""
    if not quiet and sys.stderr.isatty():
        return BarProgress()
    return LogProgress(interval=float("inf") if quiet else 5.0)
