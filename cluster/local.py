"""Ranks on this machine, started without a launcher: one process each.

Ranks learn their place from RANK, LOCAL_RANK and WORLD_SIZE, as from any launcher. Several ranks
meet at MASTER_ADDR and MASTER_PORT, a socket on the loopback interface that listens already when
they start and that rank 0 inherits (MASTER_LISTEN_FD): no other program can take the port in
between, and no other machine can reach it. One rank meets nobody.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import IO

from cluster.errors import EXIT_PREEMPTED, LaunchError
from cluster.outcome import Ended
from cluster.rank.orphan import LAUNCHER_PID
from cluster.supervise import say

GRACE_SECONDS = 20.0
"""Time for the other ranks to state what they met after one has died; then they are killed."""
_PLACE = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "MASTER_LISTEN_FD")
_GOOD = (0, EXIT_PREEMPTED)


class LocalRanks:
    """One process a rank, in a session of its own.

    `environment` is the whole environment of a rank but for its place. Ranks write to `output`
    and `errors` (default: this process's). Raises LaunchError when a process cannot be started.
    """

    def __init__(
        self,
        command: list[str],
        ranks: int,
        environment: Mapping[str, str],
        *,
        output: IO[str] | None = None,
        errors: IO[str] | None = None,
        grace_seconds: float = GRACE_SECONDS,
    ) -> None:
        self._processes: list[subprocess.Popen[bytes]] = []
        self._first: tuple[int, int] | None = None
        self._grace = grace_seconds
        self._deadline = float("inf")
        base = {k: v for k, v in environment.items() if k not in _PLACE}
        base |= {LAUNCHER_PID: str(os.getpid()), "WORLD_SIZE": str(ranks)}
        # Open until all ranks have started; from then on rank 0 alone listens.
        with socket.create_server(("127.0.0.1", 0)) as meeting:
            if ranks > 1:
                base |= {
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(meeting.getsockname()[1]),
                    "MASTER_LISTEN_FD": str(meeting.fileno()),
                }
            for rank in range(ranks):
                inherited = (meeting.fileno(),) if rank == 0 else ()
                self._start(rank, command, base, inherited, (output, errors))

    def poll(self) -> Ended | None:
        """The end of all ranks, None while one runs; kills the others some time after a death."""
        codes = [process.poll() for process in self._processes]
        if self._first is None:
            self._note_first(codes)
        if None not in codes:
            rank, code = self._first or (0, 0)
            return Ended(f"rank {rank}", code)
        if time.monotonic() > self._deadline:
            self._deadline = float("inf")
            rank, code = self._first or (0, 0)
            say(f"{Ended(f'rank {rank}', code)}; killing the other ranks, which did not end")
            self.kill()
        return None

    def stop(self) -> None:
        """SIGTERM to every rank."""
        for process in self._processes:
            process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL to every rank's process group: also to what ranks have started themselves."""
        for process in self._processes:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def _start(
        self,
        rank: int,
        command: list[str],
        base: Mapping[str, str],
        inherited: tuple[int, ...],
        streams: tuple[IO[str] | None, IO[str] | None],
    ) -> None:
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        try:
            process = subprocess.Popen(
                command,
                env={**base, **place},
                stdin=subprocess.DEVNULL,
                stdout=streams[0],
                stderr=streams[1],
                start_new_session=True,
                pass_fds=inherited,
            )
        except OSError as error:
            self.kill()
            raise LaunchError(f"cannot start {command[0]}: {error.strerror}") from None
        self._processes.append(process)

    def _note_first(self, codes: list[int | None]) -> None:
        """Note the first rank that failed; of several at once rather one that was killed."""
        failed = [(rank, code) for rank, code in enumerate(codes) if code not in (None, *_GOOD)]
        if failed:
            self._first = min(failed, key=lambda pair: (pair[1] or 0) >= 0)
            self._deadline = time.monotonic() + self._grace
