"""State of a study's runs, read from their folders; nothing is locked and nothing is imported."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cluster.folder import in_use
from cluster.status import read_status

RunState = Literal["waiting", "running", "interrupted", "failed", "finished", "stopped"]
"""`stopped`: finished before its schedule by a stopping rule; `interrupted`: stopped by a signal or
killed, and resumed by the next start."""
DONE = ("finished", "stopped")
_TAIL_BYTES = 8192


@dataclass(frozen=True)
class Progress:
    """State of one run."""

    state: RunState
    step: int
    loss: float | None
    """Latest training loss."""
    validation: float | None
    """Latest validation loss in nats per token."""
    speed: float | None
    """Tokens a second, of the latest report."""
    message: str

    @property
    def done(self) -> bool:
        """True where nothing is left to do."""
        return self.state in DONE


def read_progress(run: Path) -> Progress:
    """State of a run and its latest measurements."""
    status = read_status(run) or {}
    latest = _latest(run / "metrics.jsonl")
    stated, message = status.get("state"), str(status.get("message", ""))
    state: RunState = "waiting"
    if stated == "finished":
        state = "stopped" if message else "finished"
    elif in_use(run):
        state = "running"
    elif stated == "failed":
        state = "failed"
    elif stated is not None:
        state = "interrupted"
    step = int(status.get("step", 0))
    return Progress(
        state=state,
        step=max(step, int(latest.get("step", 0))) if state == "running" else step,
        loss=latest.get("train/loss"),
        validation=latest.get("validation/nats_per_token"),
        speed=latest.get("train/tokens_per_second"),
        message=message,
    )


def _latest(path: Path) -> dict[str, Any]:
    """Latest value of each measurement in the last lines of a file that may grow."""
    try:
        with path.open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - _TAIL_BYTES))
            lines = file.read().splitlines()
    except OSError:
        return {}
    found: dict[str, Any] = {}
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:  # the first line may be cut, the last one incomplete
            continue
        if isinstance(row, dict):
            found |= row
    return found
