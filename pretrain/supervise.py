"""Run the launcher, hand signals to the ranks themselves, leave no process behind.

DeepSpeed's launcher answers SIGTERM by ending its ranks, and on several hosts by a `pkill` that
also hits other people's jobs; so it is never signalled. It runs in a session of its own (Ctrl-C in
the terminal reaches only us), and the ranks, found by that session, get SIGTERM: they save and
exit. A second signal kills everything at once.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from types import FrameType
from typing import IO, TYPE_CHECKING

from pretrain.errors import LaunchError

if TYPE_CHECKING:
    from pretrain.launch import Launch

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
_POLL_SECONDS = 0.2
_STRAGGLER_SECONDS = 60.0
"""How long ranks may outlive their launcher before they are killed."""


@dataclass(frozen=True)
class Ended:
    """The launcher's exit code, and the signal that asked the ranks to stop.

    `stopped_by` is None as well when a second signal killed them.
    """

    return_code: int
    stopped_by: str | None


def supervise(plan: Launch, *, output: IO[str] | None = None, keep_open: int) -> Ended:
    """Run the command to its end; a signal to this process becomes one to the ranks.

    The launcher inherits the descriptor `keep_open`, the lock of the run folder.
    """
    received: list[int] = []
    with _noting(received):
        try:
            launcher = subprocess.Popen(
                plan.command,
                env={**os.environ, **plan.environment},
                stdin=subprocess.DEVNULL,
                stdout=output,
                start_new_session=True,
                pass_fds=(keep_open,),
            )
        except OSError as error:
            raise LaunchError(f"cannot start {plan.command[0]}: {error.strerror}") from None
        try:
            _wait(launcher, plan, received)
            _wait_for_stragglers(launcher.pid)
        finally:
            _kill_session(launcher.pid)
            launcher.wait()
    stopped_by = signal.Signals(received[0]).name if len(received) == 1 else None
    return Ended(launcher.returncode, stopped_by)


def ranks_of(session: int) -> list[int]:
    """Processes of a session that run the train module, also those whose launcher has died."""
    import psutil

    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if os.getsid(process.pid) == session and _is_rank(process.cmdline()):
                found.append(process.pid)
    return found


def _is_rank(command: list[str]) -> bool:
    """Ranks run `python -m pretrain.train`; the launchers merely pass the name on."""
    from pretrain.launch import MODULE

    return any(pair == ("-m", MODULE) for pair in pairwise(command))


@contextmanager
def _noting(received: list[int]) -> Iterator[None]:
    """Append signals to `received` instead of dying of them."""

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)

    previous = {number: signal.signal(number, note) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _wait(launcher: subprocess.Popen[bytes], plan: Launch, received: list[int]) -> None:
    forwarded = 0
    while launcher.poll() is None:
        if len(received) > forwarded:
            forwarded = len(received)
            name = signal.Signals(received[-1]).name
            if forwarded == 1:
                _say(f"{name}: the ranks save and stop; once more kills them")
                _stop_ranks(launcher.pid, plan)
            else:
                _say(f"{name} again: killing the ranks; the last checkpoint is intact")
                _kill_session(launcher.pid)
        time.sleep(_POLL_SECONDS)


def _stop_ranks(session: int, plan: Launch) -> None:
    if plan.hosts:
        _stop_remote_ranks(plan)
        return
    ranks = ranks_of(session)
    if not ranks:  # the launcher is still starting; nothing is lost by ending it
        with suppress(ProcessLookupError):
            os.killpg(session, signal.SIGTERM)
    for pid in ranks:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)


def _stop_remote_ranks(plan: Launch) -> None:
    """SIGTERM to this run's ranks on every host, told apart by the path of their configuration."""
    from pretrain.launch import MODULE

    config = plan.command[-1]
    pattern = f"-m [{MODULE[0]}]{MODULE[1:]} --config {config}"  # brackets: not the pkill's shell
    command = ["pdsh", "-R", "ssh", "-w", ",".join(plan.hosts)]
    command += [f"pkill -TERM -f -- {shlex.quote(pattern)}"]
    environment = {**os.environ, **plan.environment}
    done = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, check=False)
    if done.returncode > 1:
        _say(f"pdsh could not reach every host (exit code {done.returncode})")


def _wait_for_stragglers(session: int) -> None:
    """Ranks whose launcher died save and leave by themselves; give them the time to."""
    end = time.monotonic() + _STRAGGLER_SECONDS
    while time.monotonic() < end and ranks_of(session):
        time.sleep(_POLL_SECONDS)


def _kill_session(session: int) -> None:
    """Kill what is left of the launcher's process group; nothing, when all went well."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(session, signal.SIGKILL)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
