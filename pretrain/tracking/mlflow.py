"""MLflow from a thread of its own, so that no server and no lock is ever waited for.

MLflow's calls block for minutes on a dead server, and its asynchronous mode loses points without a
word. Here the step path appends to a bounded queue; a daemon thread imports MLflow (a second),
connects, sends batches, tries again after failures and counts what it had to drop. `metrics.jsonl`
has every point in any case. The price: what is queued when the process is killed reaches MLflow
only if the run is resumed from before it.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrain.tracking import Status
from pretrain.tracking.mlflow_run import MlflowRun, Point

if TYPE_CHECKING:
    from pretrain.config.run import Config

_BATCH = 1000
"""Metrics per request, MLflow's limit."""
_FLUSH_SECONDS: dict[Status, float] = {"finished": 60.0, "failed": 10.0, "preempted": 5.0}
"""How long `close` waits; a preempted run has little time and will be continued."""
_REFUSED = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST")
"""Errors that the same request would meet again."""


class MlflowSink:
    """Queue and thread in front of one MLflow run."""

    def __init__(
        self, config: Config, run_dir: Path, *, resumed: bool, report: Callable[[str], None]
    ) -> None:
        self._run = MlflowRun(config, run_dir, resumed)
        self._tell = report
        self._points: deque[Point] = deque()
        self._calls: deque[Callable[[MlflowRun], None]] = deque()
        self._capacity = config.tracking.queue_size
        self._dropped = 0
        self._failing = False
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._status: Status | None = None
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self._thread.start()

    def log(self, metrics: Mapping[str, float], step: int, time_s: float) -> None:
        """Queue measurements; when the queue is full the oldest are dropped and counted."""
        with self._lock:
            self._points.extend((k, v, int(time_s * 1000), step) for k, v in metrics.items())
            self._drop_oldest()
        self._wake.set()

    def params(self, values: Mapping[str, Any]) -> None:
        """Queue facts of the run."""
        copy = dict(values)
        self._calls.append(lambda run: run.log_params(copy))
        self._wake.set()

    def artifact(self, path: Path, folder: str) -> None:
        """Queue a file to be copied."""
        self._calls.append(lambda run: run.log_artifact(path, folder))
        self._wake.set()

    def message(self, text: str) -> None:
        """Messages are the console's."""

    def close(self, status: Status) -> None:
        """Send what is queued, for a bounded time, and say what could not be sent."""
        self._status = status
        self._wake.set()
        self._thread.join(_FLUSH_SECONDS[status])
        with self._lock:
            lost = self._dropped + len(self._points)
        if lost:
            self._report(
                f"warning: {lost:,} measurements did not reach MLflow at {self._run.uri}; "
                f"metrics.jsonl has them all"
            )
        elif self._thread.is_alive():
            self._report(f"warning: MLflow at {self._run.uri} did not take the end of the run")

    def _work(self) -> None:
        pause = 1.0
        while True:
            self._wake.wait()
            self._wake.clear()
            ending = self._status
            try:
                self._send_all()
                if ending is not None:
                    self._run.end(ending)
            except Exception as error:  # whatever MLflow raises, the run goes on
                self._note_failure(error)
                if ending is not None:
                    return
                self._wait_unless_closing(pause)
                pause = min(2 * pause, 60.0)
                self._wake.set()
                continue
            if ending is not None:
                return
            pause = 1.0
            self._note_success()

    def _wait_unless_closing(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while self._status is None and time.monotonic() < end:
            time.sleep(0.1)

    def _send_all(self) -> None:
        self._run.connect()
        while self._calls:
            try:
                self._calls[0](self._run)
            except Exception as error:
                if not _is_final(error):
                    raise
                self._report(f"warning: MLflow takes no part of this run's facts: {_line(error)}")
            self._calls.popleft()
        while points := self._take():
            try:
                self._run.log_points(points)
            except Exception as error:
                with self._lock:
                    if _is_final(error):
                        self._dropped += len(points)
                    else:
                        self._points.extendleft(reversed(points))
                        self._drop_oldest()
                raise

    def _take(self) -> list[Point]:
        with self._lock:
            return [self._points.popleft() for _ in range(min(_BATCH, len(self._points)))]

    def _drop_oldest(self) -> None:
        while len(self._points) > self._capacity:
            self._points.popleft()
            self._dropped += 1

    def _report(self, text: str) -> None:
        with suppress(Exception):  # the terminal may be gone; the thread must not die of it
            self._tell(text)

    def _note_failure(self, error: Exception) -> None:
        if not self._failing:
            self._failing = True
            self._report(
                f"warning: MLflow at {self._run.uri} fails ({_line(error)}); training goes on, "
                f"measurements are kept and sent later"
            )

    def _note_success(self) -> None:
        if self._failing:
            self._failing = False
            lost = f"; {self._dropped:,} measurements were dropped" if self._dropped else ""
            self._report(f"MLflow at {self._run.uri} works again{lost}")


def _is_final(error: Exception) -> bool:
    """Whether the same request would fail again."""
    missing = isinstance(error, (FileNotFoundError, IsADirectoryError, PermissionError))
    return missing or getattr(error, "error_code", "") in _REFUSED


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}"
