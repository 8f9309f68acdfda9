"""`status.json` of a run folder: how the last process that trained there ended.

The exit code of a launcher is not to be trusted (it can be 0 after its ranks were killed), so the
run itself states its end; a missing or `running` status after the exit means that it died.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Literal

State = Literal["running", "finished", "preempted", "failed"]


def write_status(run: Path, state: State, *, step: int, message: str = "", exit_code: int) -> None:
    """Replace the status atomically."""
    partial = run / f".status.json.{os.getpid()}"
    value = {"state": state, "step": step, "message": message, "exit_code": exit_code}
    partial.write_text(json.dumps(value) + "\n")
    os.replace(partial, run / "status.json")


def write_failure(run: Path, error: Exception, step: int | None = None) -> None:
    """State an error; without `step` the run was last heard of where the earlier status says."""
    earlier = read_status(run)
    if step is None:
        step = earlier["step"] if earlier else 0
    code = int(getattr(error, "exit_code", 1))
    write_status(
        run, "failed", step=step, message=f"{type(error).__name__}: {error}", exit_code=code
    )


def read_status(run: Path) -> dict[str, Any] | None:
    """The last status, or None where nothing was trained."""
    try:
        value: dict[str, Any] = json.loads((run / "status.json").read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return value
