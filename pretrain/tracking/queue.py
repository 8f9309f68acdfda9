"""Queue and thread in front of a tracker, so that training never waits for a server or a lock.

Clients of trackers block for minutes on a dead server, and their asynchronous modes lose points
without a message. Here a training step appends to a bounded queue. A daemon thread connects, sends
batches, tries again after failures and counts the measurements that it had to drop. `metrics.jsonl`
is written first; a later start reads from it the measurements that were not delivered. So a killed
process loses no measurement, and a new server gets the whole curve. A tracker is a `Client`: plain
calls that may block and raise.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    from pretrain.tracking import Status

_BATCH = 1000
"""Measurements per request, MLflow's limit."""
_FLUSH_SECONDS: dict[Status, float] = {"finished": 60.0, "failed": 10.0, "preempted": 5.0}
"""Seconds that `close` waits; a preempted run has little time, and a later start sends the rest."""
_CONNECT_SECONDS = 15.0
"""Time after which the thread connects although there is no measurement yet; to import the library
at once would slow down the first step."""


class Point(NamedTuple):
    """One measurement."""

    name: str
    value: float
    time_ms: int
    """Milliseconds since 1970."""
    step: int


class Client(Protocol):
    """One tracking service, called from one thread only; may block, may raise anything."""

    address: str
    """Address of the service, for messages."""

    def connect(self) -> bool:
        """Start a run of the service, or continue an earlier one and return True.

        It is called before each sending; only the first call connects.
        """

    def log_points(self, points: list[Point]) -> None:
        """Store up to 1,000 measurements."""

    def log_params(self, values: Mapping[str, Any]) -> None:
        """Store settings and properties of the run."""

    def log_artifact(self, path: Path, folder: str) -> None:
        """Store a file."""

    def end(self, status: Status) -> None:
        """Mark the run as ended."""

    def is_final(self, error: Exception) -> bool:
        """True where the same request would fail again."""


class QueuedSink:
    """Queue and thread in front of one client."""

    def __init__(
        self,
        name: str,
        client: Client,
        run_dir: Path,
        *,
        capacity: int,
        report: Callable[[str], None],
    ) -> None:
        """`capacity` measurements are kept while the service does not answer."""
        self._name, self._client, self._run_dir = name, client, run_dir
        self._delivered_file = run_dir / f"{name}_delivered.json"
        self._show = report
        self._points: deque[Point] = deque()
        self._calls: deque[Callable[[Client], None]] = deque()
        self._capacity = capacity
        self._dropped = 0
        self._failing = False
        self._connected = False
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._status: Status | None = None
        self._earlier = _recorded(run_dir / "metrics.jsonl")
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def log(self, metrics: Mapping[str, float], step: int, time_s: float) -> None:
        """Queue measurements; when the queue is full the oldest are dropped and counted."""
        with self._lock:
            self._points.extend(_points(metrics, step, time_s))
            self._drop_oldest()
        self._wake.set()

    def params(self, values: Mapping[str, Any]) -> None:
        """Queue properties of the run."""
        copy = dict(values)
        self._calls.append(lambda client: client.log_params(copy))

    def artifact(self, path: Path, folder: str) -> None:
        """Queue a file to be copied."""
        self._calls.append(lambda client: client.log_artifact(path, folder))
        self._wake.set()

    def message(self, text: str) -> None:
        """Do nothing: the console shows messages."""

    def close(self, status: Status) -> None:
        """Send the queue, for a bounded time, and report the measurements that remain."""
        self._status = status
        self._wake.set()
        self._thread.join(_FLUSH_SECONDS[status])
        with self._lock:
            lost = self._dropped + len(self._points)
        if lost:
            self._report(
                f"warning: {lost:,} measurements did not reach {self._where}; metrics.jsonl has "
                "them all"
            )
        elif self._thread.is_alive():
            self._report(f"warning: {self._where} did not confirm the end of the run")

    @property
    def _where(self) -> str:
        return f"{self._name} at {self._client.address}"

    def _work(self) -> None:
        pause = 1.0
        self._wake.wait(_CONNECT_SECONDS)
        self._wake.set()
        while True:
            self._wake.wait()
            self._wake.clear()
            ending = self._status
            try:
                self._send_all()
                if ending is not None:
                    self._client.end(ending)
            except Exception as error:  # whatever the service raises, the run goes on
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
        continued = self._client.connect()
        if not self._connected:
            self._connected = True
            self._queue_undelivered(continued)
        while self._calls:
            try:
                self._calls[0](self._client)
            except Exception as error:
                if not self._client.is_final(error):
                    raise
                self._report(f"warning: {self._name} refused properties or files of this run: "
                             f"{_line(error)}")  # fmt: skip
            self._calls.popleft()
        while points := self._take():
            try:
                self._client.log_points(points)
            except Exception as error:
                with self._lock:
                    if self._client.is_final(error):
                        self._dropped += len(points)
                    else:
                        self._points.extendleft(reversed(points))
                        self._drop_oldest()
                raise
            self._note_delivered(points[-1])

    def _queue_undelivered(self, continued: bool) -> None:
        """Queue first the recorded measurements that the service's run does not have."""
        delivered = _read_delivered(self._delivered_file) if continued else (0, 0)
        left = [p for p in self._earlier if (p.time_ms, p.step) > delivered]
        self._earlier = []
        with self._lock:
            self._points.extendleft(reversed(left))

    def _note_delivered(self, last: Point) -> None:
        """Record the last delivered step, unless a part of that step still waits."""
        with self._lock:
            waits = bool(self._points) and self._points[0][2:] == last[2:]
        if not waits:
            with suppress(OSError):  # a full disk: the next start sends a little twice
                partial = self._delivered_file.with_name(f".{self._delivered_file.name}")
                partial.write_text(json.dumps({"time_ms": last.time_ms, "step": last.step}))
                os.replace(partial, self._delivered_file)

    def _take(self) -> list[Point]:
        with self._lock:
            return [self._points.popleft() for _ in range(min(_BATCH, len(self._points)))]

    def _drop_oldest(self) -> None:
        while len(self._points) > self._capacity:
            self._points.popleft()
            self._dropped += 1

    def _report(self, text: str) -> None:
        with suppress(Exception):  # the terminal may be gone; the thread must not die of it
            self._show(text)

    def _note_failure(self, error: Exception) -> None:
        if not self._failing:
            self._failing = True
            self._report(
                f"warning: {self._where} fails ({_line(error)}); training goes on, measurements "
                "are kept and sent later"
            )

    def _note_success(self) -> None:
        if self._failing:
            self._failing = False
            lost = f"; {self._dropped:,} measurements were dropped" if self._dropped else ""
            self._report(f"{self._where} works again{lost}")


def _points(metrics: Mapping[str, float], step: int, time_s: float) -> list[Point]:
    return [Point(name, value, round(time_s * 1000), step) for name, value in metrics.items()]


def _recorded(path: Path) -> list[Point]:
    """Measurements that an earlier start recorded."""
    from pretrain.tracking.jsonl import read_metrics

    if not path.exists():
        return []
    points = []
    for row in read_metrics(path):
        values = {name: value for name, value in row.items() if name not in ("step", "time")}
        points += _points(values, int(row["step"]), row["time"])
    return points


def _read_delivered(path: Path) -> tuple[int, int]:
    """Read (time_ms, step) of the last delivered measurement; (0, 0) where nothing is known."""
    try:
        value = json.loads(path.read_text())
        return int(value["time_ms"]), int(value["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0, 0


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}"
