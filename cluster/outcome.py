"""The outcome of a run: what its ranks stated, and how their processes ended.

A statement in the run folder counts more than an exit code: a rank that has said "finished" has
finished, and one that says nothing has died, whatever its launcher returns.
"""

from __future__ import annotations

import signal
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from cluster.errors import EXIT_PREEMPTED, LaunchError
from cluster.status import State

_RESUME = "checkpoints are intact, start the same command again to resume"


@dataclass(frozen=True)
class Ended:
    """The end of all ranks, reported by the first of them that failed."""

    who: str
    """That rank, e.g. `rank 3`; any rank when none failed."""
    exit_code: int
    """Its exit code; negative: killed by that signal; 0 when none failed."""
    stopped_by: str | None = None
    """Signal that asked the ranks to save and stop, e.g. `SIGTERM`."""
    killed: bool = False
    """True when a second signal killed the ranks."""

    def __str__(self) -> str:
        if self.exit_code >= 0:
            return f"{self.who} ended with exit code {self.exit_code}"
        name = str(-self.exit_code)
        with suppress(ValueError):
            name = signal.Signals(-self.exit_code).name
        often = " (often: out of memory)" if name == "SIGKILL" else ""
        return f"{self.who} was killed by {name}{often}"


@dataclass(frozen=True)
class Outcome:
    """End of a run, as far as it could tell."""

    state: State
    step: int | None
    message: str
    exit_code: int

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return dict(self.__dict__)


def judge(
    status: dict[str, Any] | None, ended: Ended, failure: dict[str, Any] | None = None
) -> Outcome:
    """The outcome of a run.

    `status` is rank 0's last statement, `failure` that of the first other rank that failed by
    itself.
    """
    state = status["state"] if status else None
    step = status["step"] if status else None
    at = "before the first step" if step is None else f"after it was at step {step:,}"
    if status and state in ("finished", "preempted", "failed"):
        if state == "failed" and status["exit_code"] == 1:
            return _root_cause(status, ended, failure)
        return Outcome(state, step, status["message"], status["exit_code"])
    if ended.killed:
        message = f"a second signal killed the ranks {at}; {_RESUME}"
        return Outcome("failed", step, message, LaunchError.exit_code)
    # Ranks note signals from before the first step on; one that died of it had done none.
    if ended.stopped_by and (state is None or ended.exit_code == -signal.SIGTERM):
        message = f"{ended.stopped_by} before training began; nothing had to be saved"
        return Outcome("preempted", step, message, EXIT_PREEMPTED)
    if failure and failure["exit_code"] != 1:
        return Outcome("failed", step, failure["message"], failure["exit_code"])
    if state is None and 1 < ended.exit_code <= 5:  # a rank has printed why
        return Outcome("failed", step, "", ended.exit_code)
    message = f"the ranks died {at} without a statement: {ended}; {_RESUME}"
    return Outcome("failed", step, message, LaunchError.exit_code)


def _root_cause(status: dict[str, Any], ended: Ended, failure: dict[str, Any] | None) -> Outcome:
    """The outcome of a run whose rank 0 met an error that is nobody's message to a user.

    It is often only the lost connection to a rank that was killed, or that failed for a reason.
    """
    step, message = status["step"], status["message"]
    if ended.exit_code < 0 and not ended.killed:
        message = f"{ended}; the others met {message}; {_RESUME}"
        return Outcome("failed", step, message, LaunchError.exit_code)
    if failure and failure["exit_code"] != 1:
        return Outcome("failed", step, failure["message"], failure["exit_code"])
    return Outcome("failed", step, message, status["exit_code"])
