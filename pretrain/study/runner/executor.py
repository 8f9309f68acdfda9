"""Executors of a study's runs: they take as many as there is room for, and report their ends.

`LocalExecutor` starts the ranks of several runs on this machine. Each run gets its share of the
cores, GPUs that no other run has, and a log in its folder. The number of threads of a rank does
not change while a study goes on, because it may change the last bits of a result.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from cluster.errors import ClusterError
from cluster.folder import starting
from cluster.launch import Launch, conclude, start_ranks
from cluster.machine import cores, visible_gpus
from cluster.outcome import Outcome
from cluster.supervise import Ranks
from pretrain.study.runner.memory import host_bytes, host_memory
from pretrain.study.runner.planned import Planned
from pretrain.training.start import plan_run, write_run

LOG = "output.log"
"""File in a run folder that takes what the ranks print."""
_MEMORY_SHARE = 0.9
"""Share of the machine's memory that runs may take together."""


class Executor(Protocol):
    """Place where runs are executed; every method returns at once."""

    def submit(self, run: Planned) -> bool:
        """Start a run, or return False where there is no room for it now.

        Raises FolderInUseError where somebody else trains in its folder, and other ClusterErrors
        where it cannot be started at all.
        """

    def poll(self) -> dict[str, Outcome]:
        """Outcome by name of each run that has ended since the last call."""

    def stop(self) -> None:
        """Ask every run to save and stop."""

    def kill(self) -> None:
        """Kill what is left of every run; harmless where there is nothing."""


@dataclass
class _Active:
    """A run whose ranks were started."""

    run: Planned
    ranks: Ranks
    gpus: tuple[str, ...]
    held: ExitStack
    """The lock of its folder."""


class LocalExecutor:
    """Runs on this machine, at most `jobs` at once; None takes what its cores or GPUs hold."""

    def __init__(self, runs: list[Planned], jobs: int | None) -> None:
        self._active: dict[str, _Active] = {}
        self._stopped_by: str | None = None
        self._killed = False
        self._gpus = visible_gpus()
        ranks = max((run.facts.ranks for run in runs), default=1)
        on_gpus = any(plan_run(run.config).job.on_gpus for run in runs[:1])
        units = len(self._gpus) if on_gpus else cores()
        self.jobs = jobs or max(1, units // ranks)
        self._threads = max(1, cores() // (self.jobs * ranks))
        self._memory = _MEMORY_SHARE * host_memory()

    def submit(self, run: Planned) -> bool:
        """Start a run, or return False where cores, GPUs or memory are taken."""
        if len(self._active) >= self.jobs:
            return False
        plan = plan_run(run.config)
        gpus = self._free_gpus(plan)
        if gpus is None:
            return False
        taken = sum(host_bytes(active.run) for active in self._active.values())
        if self._active and taken + host_bytes(run) > self._memory:
            return False
        with ExitStack() as held:
            held.enter_context(starting(run.folder))
            write_run(run.config)
            ranks = self._start(run, plan, gpus)
            self._active[run.name] = _Active(run, ranks, gpus, held.pop_all())
        return True

    def poll(self) -> dict[str, Outcome]:
        """Outcome by name of each run that has ended since the last call."""
        outcomes = {}
        for name, active in list(self._active.items()):
            ended = active.ranks.poll()
            if ended is None:
                continue
            active.ranks.kill()
            ended = replace(ended, stopped_by=self._stopped_by, killed=self._killed)
            outcomes[name] = conclude(active.run.folder, ended)
            active.held.close()
            del self._active[name]
        return outcomes

    def stop(self) -> None:
        """Ask every run to save and stop."""
        self._stopped_by = "SIGTERM"
        for active in self._active.values():
            active.ranks.stop()

    def kill(self) -> None:
        """Kill what is left of every run."""
        self._killed = bool(self._active)
        for active in self._active.values():
            active.ranks.kill()

    def _free_gpus(self, plan: Launch) -> tuple[str, ...] | None:
        """GPUs for a run, none where it needs none; None where too few are free."""
        if not plan.job.on_gpus or plan.hosts:
            return ()
        need = plan.job.ranks
        taken = {gpu for active in self._active.values() for gpu in active.gpus}
        free = [gpu for gpu in self._gpus if gpu not in taken]
        if need > len(self._gpus):
            raise ClusterError(
                f"the run needs {need} GPUs, this machine shows {len(self._gpus)}; "
                "change parallel.*"
            )
        return tuple(free[:need]) if len(free) >= need else None

    def _start(self, run: Planned, plan: Launch, gpus: tuple[str, ...]) -> Ranks:
        environment = dict(plan.environment)
        if run.config.parallel.threads_per_rank is None:
            environment["OMP_NUM_THREADS"] = str(self._threads)
        if gpus:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
        plan = replace(plan, environment=environment)
        path = run.folder / LOG
        try:
            with path.open("a") as log:
                print(plan, file=log, flush=True)
                return start_ranks(plan, output=log, errors=log)
        except OSError as error:
            raise ClusterError(f"cannot write {path}: {error.strerror}") from None


def last_line(run: Path) -> str:
    """Last line that a run printed, for one that failed without a statement."""
    try:
        with (run / LOG).open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - 4096))
            lines = file.read().decode(errors="replace").split("\n")
    except OSError:
        lines = []
    said = [line.strip() for line in lines if line.strip()]
    return f"{said[-1]} (see {run / LOG})" if said else f"see {run / LOG}"
