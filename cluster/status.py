"""Statements of a run in its folder: how the last process that trained there ended.

The exit code of a launcher is not to be trusted (DeepSpeed's can be 0 after its ranks were killed),
so the run itself states its end; a missing or `running` status after the exit means that it died.
Rank 0 writes `status.json`; of the other ranks, the first that fails writes `failure.json`.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
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
    """State rank 0's error; without `step` at the step of the earlier status."""
    earlier = read_status(run)
    if step is None:
        step = earlier["step"] if earlier else 0
    write_status(run, "failed", step=step, message=_line(error), exit_code=_code(error))


def write_first_failure(run: Path, rank: int, error: Exception) -> None:
    """State the error of another rank than 0, unless another one was first."""
    value = {"message": f"rank {rank}: {_line(error)}", "exit_code": _code(error)}
    with suppress(OSError), (run / "failure.json").open("x") as file:
        file.write(json.dumps(value) + "\n")


def read_status(run: Path) -> dict[str, Any] | None:
    """The last status, or None where nothing was trained."""
    return _read(run / "status.json")


def read_first_failure(run: Path) -> dict[str, Any] | None:
    """Message and exit code of the first failure of a rank other than 0, or None."""
    return _read(run / "failure.json")


def forget_statements(run: Path) -> None:
    """Remove what an earlier attempt stated, so that it is not taken for the next one's."""
    for name in ("status.json", "failure.json"):
        (run / name).unlink(missing_ok=True)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _code(error: Exception) -> int:
    return int(getattr(error, "exit_code", 1))
