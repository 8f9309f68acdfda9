"""Execution of a study: every run that is not done, several at once, until all have ended.

The same call again goes on where it was: a run is done when it says so in its folder, and every
other one resumes from its newest checkpoint. Nothing is kept in this process that is not in the
folders, so that it may be killed at any moment.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from cluster.errors import EXIT_PREEMPTED, ClusterError, FolderInUseError
from cluster.folder import exclusive
from cluster.outcome import Outcome
from cluster.supervise import noting_signals
from pretrain.errors import TrainingError
from pretrain.study.runner.display import LogDisplay
from pretrain.study.runner.executor import Executor, last_line
from pretrain.study.runner.planned import Planned
from pretrain.study.runner.state import read_progress

_POLL_SECONDS = 0.1
_BUSY_SECONDS = 2.0
"""Pause before another try to start a run whose folder somebody else holds."""


@dataclass
class Summary:
    """Names of the runs by how they ended."""

    done: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    """Message of each run that failed."""
    left: list[str] = field(default_factory=list)
    """Runs that a signal stopped, or that were not started."""

    @property
    def exit_code(self) -> int:
        """0 when all is done, 75 after a signal, 5 when runs failed."""
        if self.failed:
            return TrainingError.exit_code
        return EXIT_PREEMPTED if self.left else 0


@contextmanager
def holding(folder: Path) -> Iterator[None]:
    """Hold the folder of a study; ClusterError where another process executes it."""
    try:
        with exclusive(folder):
            yield
    except FolderInUseError as error:
        who = str(error).partition("; wait")[0]
        raise ClusterError(f"the study in {who}; wait for it, or stop it") from None


def execute(runs: list[Planned], executor: Executor, display: LogDisplay) -> Summary:
    """Execute every run that is not done; a signal stops all, a second one kills them."""
    work = _Work(runs, executor, display)
    received: list[int] = []
    with noting_signals(received):
        try:
            handled = 0
            while work.goes_on():
                if len(received) > handled:
                    handled = len(received)
                    work.interrupt(signal.Signals(received[-1]).name, again=handled > 1)
                work.start_more()
                work.collect()
                display.refresh(work.active)
                time.sleep(_POLL_SECONDS)
        finally:
            executor.kill()
    work.summary.left += [run.name for run in work.waiting]
    return work.summary


class _Work:
    """Runs that wait, those that train, and what became of the others."""

    def __init__(self, runs: list[Planned], executor: Executor, display: LogDisplay) -> None:
        self.executor, self.display = executor, display
        self.active: dict[str, Planned] = {}
        self.summary = Summary()
        self.waiting: list[Planned] = []
        self.total = len(runs)
        self._stopping = False
        self._not_before: dict[str, float] = {}
        for run in runs:
            if read_progress(run.folder).done:
                self.summary.done.append(run.name)
            else:
                self.waiting.append(run)
        if self.summary.done:
            display.note(f"{len(self.summary.done)} of {self.total} runs were done before")

    def goes_on(self) -> bool:
        """True while a run trains or may be started."""
        return bool(self.active) or (bool(self.waiting) and not self._stopping)

    def interrupt(self, name: str, *, again: bool) -> None:
        """Stop the runs, or kill them where they were asked before."""
        self._stopping = True
        if again:
            self.display.note(f"{name} again: killing the runs; the last checkpoints are intact")
            self.executor.kill()
        else:
            self.display.note(f"{name}: the runs save and stop; once more kills them")
            self.executor.stop()

    def start_more(self) -> None:
        """Start waiting runs for which there is room."""
        if self._stopping:
            return
        self._give_up_without_trunk()
        for run in list(self.waiting):
            if not run.is_ready:
                continue
            if self._not_before.get(run.name, 0.0) > time.monotonic():
                continue
            try:
                if not self.executor.submit(run):
                    break
            except FolderInUseError as error:
                if run.name not in self._not_before:
                    self.display.note(f"waiting: {str(error).partition(';')[0]}")
                self._not_before[run.name] = time.monotonic() + _BUSY_SECONDS
                continue
            except ClusterError as error:
                self.waiting.remove(run)
                self.summary.failed[run.name] = str(error)
                self.display.note(f"failed {run.name}: {error}")
                continue
            self.waiting.remove(run)
            self.active[run.name] = run
            self.display.note(f"started {run.name}")

    def _give_up_without_trunk(self) -> None:
        """Count branches as failed where nothing goes on that could make their checkpoints."""
        if self.active or any(run.is_ready for run in self.waiting):
            return
        for run in self.waiting:
            text = f"its trunk has no checkpoint {run.origin}; execute the trunk first"
            self.summary.failed[run.name] = text
            self.display.note(f"failed {run.name}: {text}")
        self.waiting.clear()

    def collect(self) -> None:
        """Note the runs that have ended."""
        for name, outcome in self.executor.poll().items():
            self._ended(self.active.pop(name), outcome)

    def _ended(self, run: Planned, outcome: Outcome) -> None:
        if outcome.state == "finished":
            self.summary.done.append(run.name)
            about = f"finished {run.name} at step {outcome.step or 0:,}"
            about += f", {outcome.message}" if outcome.message else ""
            self.display.note(f"{about} ({len(self.summary.done)} of {self.total})")
        elif outcome.state == "preempted":
            self.summary.left.append(run.name)
            self.display.note(f"stopped {run.name} at step {outcome.step or 0:,}")
        else:
            why = outcome.message or last_line(run.folder)
            self.summary.failed[run.name] = why
            self.display.note(f"failed {run.name}: {why}")
