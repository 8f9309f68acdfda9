"""Display of a study that runs: a table on a terminal, a line for each event in a log."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Iterable
from typing import IO, Any

from pretrain.study.runner.planned import Facts, Planned
from pretrain.study.runner.state import DONE, Progress, read_progress

_LINE_SECONDS = 60.0
_TABLE_SECONDS = 1.0


def fraction(done: int, total: int) -> str:
    """Share of the steps that are done."""
    return f"{done:,}/{total:,}"


def row(facts: Facts, progress: Progress) -> tuple[str, str, str, str, str]:
    """Cells of one run: name, state, steps, losses, speed."""
    number = lambda value: "" if value is None else f"{value:.4g}"  # noqa: E731
    speed = f"{progress.speed:,.0f}" if progress.speed and progress.state == "running" else ""
    return (
        facts.run,
        progress.state,
        fraction(progress.step, facts.last_step),
        f"{number(progress.loss)} {number(progress.validation)}".strip(),
        speed,
    )


class LogDisplay:
    """Events as lines, and every minute a line about the runs that train."""

    def __init__(self, runs: Iterable[Planned], file: IO[str] | None = None) -> None:
        self._file = file
        self._runs = {run.name: run for run in runs}
        self._shown = time.monotonic()

    def __enter__(self) -> LogDisplay:
        return self

    def __exit__(self, *about: object) -> None:
        return

    def note(self, text: str) -> None:
        """Print a line that stays."""
        print(text, file=self._file, flush=True)

    def refresh(self, active: Iterable[str]) -> None:
        """Show how far the active runs are, from time to time."""
        if time.monotonic() - self._shown < _LINE_SECONDS:
            return
        self._shown = time.monotonic()
        for name in active:
            run = self._runs[name]
            _, _, steps, losses, speed = row(run.facts, read_progress(run.folder))
            self.note(f"  {name}: step {steps}, loss {losses or '-'}, {speed or '-'} tokens/s")


class TableDisplay(LogDisplay):
    """A live table of the active runs, with counts of all of them."""

    def __enter__(self) -> TableDisplay:
        from rich.live import Live

        self._live: Any = Live(refresh_per_second=2)
        self._live.start()
        return self

    def __exit__(self, *about: object) -> None:
        self._live.stop()

    def note(self, text: str) -> None:
        """Print a line above the table."""
        self._live.console.print(text, markup=False, highlight=False)

    def refresh(self, active: Iterable[str]) -> None:
        """Renew the table."""
        if time.monotonic() - self._shown < _TABLE_SECONDS:
            return
        self._shown = time.monotonic()
        from rich.table import Table

        states = {name: read_progress(run.folder) for name, run in self._runs.items()}
        counts = Counter("done" if p.state in DONE else p.state for p in states.values())
        title = ", ".join(f"{count} {state}" for state, count in counts.items())
        table = Table(title=title, title_justify="left")
        for heading in ("run", "state", "steps", "loss, validation", "tokens/s"):
            table.add_column(heading)
        for name in active:
            table.add_row(*row(self._runs[name].facts, states[name]))
        self._live.update(table)


def make_display(runs: Iterable[Planned], *, quiet: bool = False) -> LogDisplay:
    """Display for standard output; with `quiet` lines on standard error."""
    if quiet:
        return LogDisplay(runs, sys.stderr)
    return (TableDisplay if sys.stdout.isatty() else LogDisplay)(runs)
