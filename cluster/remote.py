"""Ranks on several machines, started by DeepSpeed's launcher over ssh.

The launcher answers SIGTERM with a `pkill` that matches every DeepSpeed job of the user, and its
exit code can be 0 after its ranks were killed. So it is never signalled: it runs in a session of
its own, and the ranks, told apart by their command, are signalled on every host through pdsh.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO

from cluster.errors import ClusterError, LaunchError
from cluster.outcome import Ended
from cluster.supervise import say

_FORWARDED = (
    *("DS_ACCELERATOR", "OMP_NUM_THREADS", "CUDA_DEVICE_MAX_CONNECTIONS"),
    *("GLOO_SOCKET_IFNAME", "NCCL_", "TORCH_"),
)
"""Variables that other hosts need; DeepSpeed itself forwards only PYTHON*, MLFLOW* and a few."""
_KEEP_ALIVE = "-o ServerAliveInterval=15 -o ServerAliveCountMax=4"
"""Without it ssh, and so the launcher, waits for ever on a host that lost its network."""


class RemoteRanks:
    """DeepSpeed's launcher and the ranks that it started on `hosts`.

    `environment` is that of the launcher, `rank_command` the end of every rank's command line.
    Raises LaunchError when the launcher cannot be started.
    """

    def __init__(
        self,
        command: list[str],
        environment: Mapping[str, str],
        hosts: tuple[str, ...],
        rank_command: list[str],
        *,
        output: IO[str] | None = None,
    ) -> None:
        self._hosts, self._rank_command = hosts, rank_command
        self._environment = dict(environment)
        try:
            self._launcher = subprocess.Popen(
                command,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                start_new_session=True,
            )
        except OSError as error:
            raise LaunchError(f"cannot start {command[0]}: {error.strerror}") from None

    def poll(self) -> Ended | None:
        """The end of the launcher, which ends after its ranks."""
        code = self._launcher.poll()
        if code is None:
            return None
        if code > 192:  # the negative code of a rank that was killed, modulo 256
            return Ended("a rank", code - 256)
        return Ended("the launcher", code)

    def stop(self) -> None:
        """SIGTERM to this run's ranks on every host."""
        self._signal_ranks("TERM")

    def kill(self) -> None:
        """SIGKILL to the ranks on every host, while the launcher runs, and to the launcher."""
        if self._launcher.poll() is None:
            self._signal_ranks("KILL")
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._launcher.pid, signal.SIGKILL)
        self._launcher.wait()

    def _signal_ranks(self, name: str) -> None:
        pattern = rank_pattern(self._rank_command)
        command = ["pdsh", "-R", "ssh", "-w", ",".join(self._hosts)]
        command += [f"pkill -{name} -f -- {shlex.quote(pattern)}"]
        try:
            done = subprocess.run(
                command, env=self._environment, stdin=subprocess.DEVNULL, check=False
            )
        except OSError as error:
            say(f"cannot start pdsh ({error.strerror}): the ranks were not signalled")
            return
        if done.returncode > 1:  # 1: a host without ranks
            say(f"pdsh could not reach every host (exit code {done.returncode})")


def rank_pattern(rank_command: list[str]) -> str:
    """A pattern for pkill that matches ranks with exactly this command, but not its own line."""
    text = " ".join(rank_command)
    escaped = re.sub(r"([.^$*+?()\[\]{}|\\])", r"\\\1", text)
    first = next(i for i, letter in enumerate(escaped) if letter.isalnum())
    return f"{escaped[:first]}[{escaped[first]}]{escaped[first + 1 :]}$"


def launcher_command(hostfile: Path, module: str, arguments: list[str]) -> list[str]:
    """DeepSpeed's command for the hosts of a file; raises ClusterError where it is missing."""
    return [
        _deepspeed(),
        *("--hostfile", str(hostfile), "--force_multi", "--master_port", str(_free_port())),
        *("--no_local_rank", "--log_level", "error", "--module", module, *arguments),
    ]


def launcher_environment(environ: Mapping[str, str], environment_file: Path) -> dict[str, str]:
    """Variables that DeepSpeed's launcher needs beside `environ`."""
    options = f"{environ.get('PDSH_SSH_ARGS_APPEND', '')} {_KEEP_ALIVE}".strip()
    return {"DS_ENV_FILE": str(environment_file), "PDSH_SSH_ARGS_APPEND": options}


def write_environment_file(environment: Mapping[str, str], path: Path) -> None:
    """KEY=VALUE lines for DeepSpeed to set on every host, after those of `.deepspeed_env` files.

    DeepSpeed splits each line at `=` and fails on an empty one.
    """
    lines: dict[str, str] = {}
    for folder in (Path.home(), Path.cwd()):
        kept = folder / ".deepspeed_env"
        if kept.is_file():
            rows = [row for row in kept.read_text().splitlines() if "=" in row]
            lines |= dict(row.split("=", 1) for row in rows)
    lines |= {k: v for k, v in environment.items() if k.startswith(_FORWARDED) and "\n" not in v}
    path.write_text("".join(f"{k}={v}\n" for k, v in lines.items()))


def _deepspeed() -> str:
    beside = Path(sys.executable).with_name("deepspeed")
    found = str(beside) if beside.exists() else shutil.which("deepspeed")
    if found is None:
        raise ClusterError(f"no deepspeed command beside {sys.executable}; pip install deepspeed")
    return found


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])
