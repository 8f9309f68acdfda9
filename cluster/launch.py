"""The launch of a job: the command that starts its ranks, and the place where they run.

On one machine this process starts the ranks itself; on the machines of a hostfile DeepSpeed's
launcher does. Ranks started by SLURM or torchrun do not pass through here: they run the module
themselves.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from cluster.hosts import read_hostfile
from cluster.local import LocalRanks
from cluster.machine import check_visible_gpus, is_this_machine
from cluster.outcome import Ended, Outcome, judge
from cluster.remote import (
    RemoteRanks,
    launcher_command,
    launcher_environment,
    write_environment_file,
)
from cluster.status import read_first_failure, read_status, write_status
from cluster.supervise import Ranks, supervise


@dataclass(frozen=True)
class Job:
    """A run as this room knows it: a Python module, its arguments, a folder, a number of ranks."""

    module: str
    arguments: list[str]
    folder: Path
    """Folder in which the ranks state how they ended; it exists and is locked by this process."""
    ranks: int
    environment: dict[str, str] = field(default_factory=dict)
    """Variables that all ranks get beside those of this process."""
    on_gpus: bool = False
    """True where every rank takes a GPU."""
    hostfile: Path | None = None
    """Machines to start on; None: this one."""

    @property
    def rank_command(self) -> list[str]:
        """The command of one rank, without its interpreter."""
        return ["-u", "-m", self.module, *self.arguments]


@dataclass(frozen=True)
class Launch:
    """A command that starts ranks, and what it adds to the environment."""

    job: Job
    command: list[str]
    environment: dict[str, str]
    hosts: tuple[str, ...] = ()
    """Machines that the command starts ranks on; empty: it is the command of one rank here."""

    def __str__(self) -> str:
        """Command line of the launcher, or of a rank after the number of ranks."""
        variables = [f"{k}={shlex.quote(v)}" for k, v in sorted(self.environment.items())]
        line = " ".join([*variables, shlex.join(self.command)])
        return line if self.hosts or self.job.ranks == 1 else f"{self.job.ranks} ranks: {line}"


def plan_launch(job: Job, environ: Mapping[str, str] | None = None) -> Launch:
    """The launch of a job; raises ClusterError where none can work."""
    environ = os.environ if environ is None else environ
    hosts = () if job.hostfile is None else tuple(read_hostfile(job.hostfile))
    if job.hostfile is None or is_this_machine(hosts):
        if job.on_gpus:
            check_visible_gpus(environ.get("CUDA_VISIBLE_DEVICES"), job.ranks)
        more = _module_path(environ)
        return Launch(job, [sys.executable, *job.rank_command], {**more, **job.environment})
    command = launcher_command(job.hostfile, job.module, job.arguments)
    more = _module_path(environ) | launcher_environment(environ, job.folder / "deepspeed_env")
    return Launch(job, command, {**job.environment, **more}, hosts)


def _module_path(environ: Mapping[str, str]) -> dict[str, str]:
    """Variables by which ranks import the code that this process runs, and nothing beside it.

    The working folder stays out of the module path: a folder `parallel/` or a file `json.py` there
    would be imported in place of the installed one. Where this process found its code there
    (`python -m` in a checkout), that folder is named. DeepSpeed forwards both to other hosts.
    """
    variables = {"PYTHONSAFEPATH": "1"}
    root = str(Path(__file__).resolve().parents[1])
    if sys.path[:1] == [root]:
        given = environ.get("PYTHONPATH")
        variables["PYTHONPATH"] = os.pathsep.join([root, given] if given else [root])
    return variables


def launch(plan: Launch, *, output: IO[str] | None = None) -> Outcome:
    """Start the ranks, watch them to their end, their failure or a signal; see `Outcome`.

    `output` takes what they print (default: this process's standard output). Where no rank said how
    the run ended, the outcome becomes its status. Raises LaunchError when they cannot be started.
    """
    print(plan, file=output or sys.stdout, flush=True)
    return conclude(plan.job.folder, supervise(lambda: start_ranks(plan, output=output)))


def start_ranks(
    plan: Launch, *, output: IO[str] | None = None, errors: IO[str] | None = None
) -> Ranks:
    """Start the ranks and return at once; `errors` takes their standard error (default: ours).

    Raises LaunchError when they cannot be started.
    """
    environment = {**os.environ, **plan.environment}
    if not plan.hosts:
        ranks = plan.job.ranks
        return LocalRanks(plan.command, ranks, environment, output=output, errors=errors)
    write_environment_file(environment, plan.job.folder / "deepspeed_env")
    return RemoteRanks(
        plan.command,
        environment,
        plan.hosts,
        plan.job.rank_command,
        output=output,
    )


def conclude(folder: Path, ended: Ended) -> Outcome:
    """Judge how a run ended; where no rank has said so, the outcome becomes its status."""
    stated = read_status(folder)
    outcome = judge(stated, ended, read_first_failure(folder))
    if stated is None or stated["state"] == "running":
        write_status(
            folder,
            outcome.state,
            step=outcome.step or 0,
            message=outcome.message,
            exit_code=outcome.exit_code,
        )
    return outcome
