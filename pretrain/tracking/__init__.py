"""Tracking by JSONL, console and services such as MLflow; no failure here stops a run.

`open_tracking` gives rank 0 an object that passes every measurement to each sink, and the other
ranks one that does nothing. A sink that fails is reported once and the run goes on, because a loss
curve with a gap is better than no run. JSONL is the record; MLflow is a view of it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from pretrain.config.run import Config

Status = Literal["finished", "preempted", "failed"]


class Sink(Protocol):
    """Destination of measurements; methods return at once, and their errors are reported only."""

    def log(self, metrics: Mapping[str, float], step: int, time_s: float) -> None:
        """Record measurements of one step, taken at `time_s` (seconds since 1970)."""

    def params(self, values: Mapping[str, Any]) -> None:
        """Record settings and properties of the run that do not change from step to step."""

    def artifact(self, path: Path, folder: str) -> None:
        """Store a file with the measurements."""

    def message(self, text: str) -> None:
        """Show a sentence to the user."""

    def close(self, status: Status) -> None:
        """Flush for a bounded time and release all resources."""


class Tracking:
    """All sinks of one run; no method raises, and none waits for a network or a database."""

    def __init__(self, sinks: dict[str, Sink]) -> None:
        self._sinks = sinks
        self._reported: set[str] = set()

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Record measurements (name -> number) of optimizer step `step`."""
        now = round(time.time(), 3)  # as metrics.jsonl has it: trackers tell attempts by their time
        self._each("log", {k: float(v) for k, v in metrics.items()}, step, now)

    def log_artifact(self, path: Path, folder: str = "") -> None:
        """Store a copy of a file with every service."""
        self._each("artifact", path, folder)

    def params(self, values: Mapping[str, Any]) -> None:
        """Record properties of the run, e.g. the number of parameters."""
        self._each("params", values)

    def message(self, text: str) -> None:
        """Show a sentence to the user, above the progress bar."""
        self._each("message", text)

    def close(self, status: Status) -> None:
        """Flush every sink for a bounded time; `status` is how the run ended."""
        self._each("close", status)
        self._sinks = {}

    def __enter__(self) -> Tracking:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close("finished" if kind is None else "failed")

    def _each(self, method: str, *arguments: Any) -> None:
        for name, sink in self._sinks.items():
            try:
                getattr(sink, method)(*arguments)
            except Exception as error:  # a tracker may fail in any way; the run goes on
                self._report(name, error)

    def _report(self, name: str, error: Exception) -> None:
        if name in self._reported:
            return
        self._reported.add(name)
        text = (
            f"warning: tracking to {name} fails ({type(error).__name__}: {error}); training goes on"
        )
        console = self._sinks.get("console")
        if console is None or name == "console":
            print(text, flush=True)
        else:
            console.message(text)


def open_tracking(
    config: Config,
    run_dir: Path,
    *,
    rank: int,
    total_steps: int,
    resumed: bool,
    start_step: int,
) -> Tracking:
    """Open the tracking of a run: every sink on rank 0, none elsewhere.

    `start_step` is the last step of the loaded checkpoint (0 at a first start). Later measurements
    of an interrupted attempt are dropped from `metrics.jsonl`, because these steps are made again.
    With `resumed` a service continues its earlier run.
    """
    if rank != 0:
        return Tracking({})
    from pretrain.tracking.console import ConsoleSink
    from pretrain.tracking.guard import GuardSink
    from pretrain.tracking.jsonl import JsonlSink

    console = ConsoleSink(total_steps=total_steps, start_step=start_step)
    sinks: dict[str, Sink] = {"console": console}
    tracking = Tracking(sinks)
    try:
        sinks["metrics.jsonl"] = JsonlSink(
            run_dir / "metrics.jsonl",
            keep_to_step=start_step if resumed else -1,
            report=console.message,
        )
    except OSError as error:
        console.message(f"warning: no metrics.jsonl in {run_dir} ({error}); training goes on")
    with suppress(OSError):  # a start by hand may have none
        sinks["config.yaml"] = GuardSink(run_dir / "config.yaml", report=console.message)
    from pretrain.tracking.queue import QueuedSink

    for settings in config.tracking.services:
        try:
            client = settings.load()(settings, config, run_dir, resumed)
        except Exception as error:  # another package's client may fail in any way
            console.message(
                f"warning: no tracking to {settings.name} ({type(error).__name__}: {error}); "
                "training goes on"
            )
            continue
        sinks[settings.name] = QueuedSink(
            settings.name,
            client,
            run_dir,
            capacity=config.tracking.queue_size,
            report=console.message,
        )
    return tracking
