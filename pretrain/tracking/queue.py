"""Queue and thread in front of a tracker, so that training never waits for a server or a lock.

Clients of trackers block for minutes on a dead server, and their asynchronous modes lose points
without a message. Here a training step appends to a bounded queue. A daemon thread connects, sends
batches and tries again after failures. `metrics.jsonl` is the write-ahead log: at the start, after
a failure and after an overflow the service is asked what it lacks of it. So each measurement
arrives once, whatever was killed, and a new server gets the whole curve. A tracker is a `Client`:
plain calls that may block and raise.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from pretrain.tracking.points import Point, once, points_of, recorded_points

if TYPE_CHECKING:
    from pretrain.tracking import Status

BATCH = 1000
"""Measurements per request, MLflow's limit."""
_FLUSH_SECONDS: dict[Status, float] = {"finished": 60.0, "failed": 10.0, "preempted": 5.0}
"""Seconds that `close` waits; a preempted run has little time, and a later start sends the rest."""
_CONNECT_SECONDS = 15.0
"""Time after which the thread connects although there is no measurement yet; to import the library
at once would slow down the first step."""


class Client(Protocol):
    """One tracking service, called from one thread only; may block, may raise anything."""

    address: str
    """Address of the service, for messages."""

    def connect(self) -> None:
        """Start a run of the service, or continue an earlier one.

        It is called before each sending; only the first call connects.
        """

    def lacking(self, recorded: Sequence[Point]) -> list[Point]:
        """Recorded measurements that the service's run lacks, of each name and step the first.

        The service may hold measurements that are not recorded: a start repeats the steps after
        its checkpoint, and then the last attempt counts.
        """

    def log_points(self, points: list[Point]) -> None:
        """Store up to 1,000 measurements."""

    def log_params(self, values: Mapping[str, Any]) -> None:
        """Store settings and properties of the run."""

    def log_artifact(self, path: Path, folder: str) -> None:
        """Store a file."""

    def end(self, status: Status, time_ms: int) -> None:
        """Mark the run as ended at a time (milliseconds since 1970)."""

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
        self._name, self._client = name, client
        self._record = run_dir / "metrics.jsonl"
        self._show = report
        self._backlog: deque[Point] = deque()
        """Recorded measurements that the service lacks; sent before the queue."""
        self._points: deque[Point] = deque()
        self._calls: deque[Callable[[Client], None]] = deque()
        self._capacity = capacity
        self._dropped = 0
        self._failing = False
        self._connected = False
        self._behind = True
        """True where the service is to be asked what it lacks of the record."""
        self._taken: tuple[int, set[str]] = (-1, set())
        """The last step, and the names that it has had."""
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._status: Status | None = None
        self._ended_ms = 0
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def log(self, metrics: Mapping[str, float], step: int, time_s: float) -> None:
        """Queue measurements; when the queue is full the oldest are left to the record."""
        with self._lock:
            if self._taken[0] != step:
                self._taken = (step, set())
            names = self._taken[1]
            self._points.extend(p for p in points_of(metrics, step, time_s) if p.name not in names)
            names.update(metrics)
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
        self._ended_ms = round(time.time() * 1000)
        self._status = status
        self._wake.set()
        self._thread.join(_FLUSH_SECONDS[status])
        with self._lock:
            lost = self._dropped + len(self._backlog) + len(self._points)
        if lost:
            self._report(
                f"warning: {lost:,} measurements did not reach {self._where}; metrics.jsonl has "
                f"them all, and `epochal track sync {self._record.parent}` sends them"
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
                    self._client.end(ending, self._ended_ms)
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
        self._client.connect()
        if self._behind:
            self._catch_up()
        self._connected = True
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
                self._send(points)
            except Exception:
                with self._lock:
                    # The service may have stored them before it failed: ask before the next try.
                    self._behind = True
                    self._points.extendleft(reversed(points))
                    self._drop_oldest()
                raise
        if self._behind:  # the queue was full in between
            self._wake.set()

    def _catch_up(self) -> None:
        """Ask the service what it lacks of the recorded and queued measurements; queue just that.

        The training thread records a report before it queues it, so that the last report may be
        recorded already and not queued yet.
        """
        with self._lock:
            waiting = list(self._points)
            self._behind = False
        recorded = recorded_points(self._record)
        try:
            lacking = self._client.lacking([*recorded, *waiting])
        except BaseException:
            self._behind = True
            raise
        with self._lock:
            known = {(p.name, p.step) for p in once([*recorded, *waiting])}
            self._points = deque(p for p in self._points if (p.name, p.step) not in known)
            if recorded and recorded[-1].step >= self._taken[0]:
                if recorded[-1].step > self._taken[0]:
                    self._taken = (recorded[-1].step, set())
                self._taken[1].update(p.name for p in recorded if p.step == recorded[-1].step)
            self._backlog = deque(lacking)
            self._dropped = 0

    def _send(self, points: list[Point]) -> None:
        """Send measurements; where the service refuses some for good, send the others."""
        try:
            self._client.log_points(points)
        except Exception as error:
            if not self._client.is_final(error):
                raise
            if len(points) == 1:
                self._report(f"warning: {self._name} refused {points[0].name} of step "
                             f"{points[0].step}: {_line(error)}")  # fmt: skip
                return
            middle = len(points) // 2
            self._send(points[:middle])
            self._send(points[middle:])

    def _take(self) -> list[Point]:
        with self._lock:
            source = self._backlog or self._points
            return [source.popleft() for _ in range(min(BATCH, len(source)))]

    def _drop_oldest(self) -> None:
        while len(self._points) > self._capacity:
            self._points.popleft()
            self._dropped += 1
            self._behind = True

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
            self._report(f"{self._where} works again")


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:500]}"
