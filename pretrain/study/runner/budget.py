"""Cost of a study before it runs: FLOPs by both conventions, GPU-hours, and the data it needs."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from pretrain.config.run import Config
from pretrain.study.runner.planned import Facts, Planned
from pretrain.study.runner.state import read_progress
from pretrain.tracking.jsonl import read_metrics

_LONGEST_PAUSE = 10.0
"""Multiple of the median time between reports, above which a run was interrupted."""


@dataclass(frozen=True)
class Cost:
    """Cost of one run."""

    facts: Facts
    flops: float
    """Counted with attention and head."""
    gpu_hours: float | None
    """On the named machine, None without one."""
    fits: bool
    """False where the planner finds that the memory of a GPU is too small."""
    hours: float | None
    """On this machine, from finished runs of the study or a given speed; None where unknown."""
    done: bool

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        about = {k: v for k, v in self.__dict__.items() if k != "facts"}
        return {**self.facts.to_dict(), "flops_6nd": self.facts.flops_6nd, **about}


@dataclass(frozen=True)
class Data:
    """Text that a study needs."""

    train: str
    unique_tokens: int
    """Largest budget."""
    validation: str
    validation_sequences: int | None
    """Number of scored sequences; None: the whole pool."""


def costs_of(
    runs: list[Planned], machine: str | None = None, flops_per_second: float | None = None
) -> list[Cost]:
    """Cost of each run; `flops_per_second` is the measured speed of one run on this machine.

    Raises ConfigError for an unknown machine, LayoutError for a layout that it cannot have.
    """
    flops = {run.name: _flops_per_token(run) * run.facts.spent_tokens for run in runs}
    done = {run.name: read_progress(run.folder).done for run in runs}
    speeds = {
        run.name: speed
        for run in runs
        if done[run.name] and (speed := _measured(run, flops[run.name])) is not None
    }
    costs = []
    for run in runs:
        gpu_hours, fits = (None, True) if machine is None else _gpu_hours(run, machine)
        speed = flops_per_second or _speed_of_similar(run, runs, speeds)
        hours = None if speed is None else flops[run.name] / speed / 3600
        costs.append(Cost(run.facts, flops[run.name], gpu_hours, fits, hours, done[run.name]))
    return costs


def data_needed(runs: Iterable[Planned]) -> list[Data]:
    """Pools of a study, each with the largest budget that a run takes from it."""
    found: dict[tuple[str, str], Data] = {}
    for run in runs:
        d, sequences = run.config.data, run.config.evaluation.sequences
        key = str(d.train), str(d.validation)
        earlier = found.get(key)
        largest = max(run.facts.unique_tokens, earlier.unique_tokens if earlier else 0)
        scored = [sequences, earlier.validation_sequences] if earlier else [sequences]
        most = None if None in scored else max(s for s in scored if s is not None)
        found[key] = Data(key[0], largest, key[1], most)
    return list(found.values())


_CACHE: dict[str, float] = {}


def _flops_per_token(run: Planned) -> float:
    from pretrain.study.runner.sizes import counted_flops_per_token

    key = repr((run.config.model, run.config.objective, run.config.data.seq_length))
    if key not in _CACHE:
        _CACHE[key] = counted_flops_per_token(run.config)
    return _CACHE[key]


def _gpu_hours(run: Planned, name: str) -> tuple[float, bool]:
    """GPU-hours of a run in its layout, and whether its memory suffices."""
    from parallel.planner.plan import estimate
    from pretrain.planning.machines import load_machine, sized
    from pretrain.planning.plan import costs, given_candidate, vocabulary

    config: Config = run.config
    machine = sized(load_machine(name), run.facts.ranks)
    model = costs(config, vocabulary(config, None)[0])
    plan = estimate(model, given_candidate(config, model, machine.num_gpus), machine)
    return plan.gpu_hours(run.facts.spent_tokens), plan.fits


def _measured(run: Planned, flops: float) -> float | None:
    """Counted FLOPs a second of a finished run, its evaluations included."""
    seconds = _seconds(run.folder / "metrics.jsonl")
    share = read_progress(run.folder).step / run.facts.last_step
    return flops * share / seconds if seconds else None


def _seconds(path: Path) -> float | None:
    """Time that a run took, without the pauses in which it was interrupted."""
    if not path.exists():
        return None
    times = sorted(row["time"] for row in read_metrics(path) if "time" in row)
    steps = [later - earlier for earlier, later in pairwise(times)]
    if not steps:
        return None
    longest = _LONGEST_PAUSE * median(steps)
    return sum(min(step, longest) for step in steps) * len(times) / len(steps)


def _speed_of_similar(run: Planned, runs: list[Planned], speeds: dict[str, float]) -> float | None:
    """Speed of the finished run of the most similar size, of the same family if possible."""
    measured = [other for other in runs if other.name in speeds]
    if not measured:
        return None
    facts = run.facts

    def distance(other: Planned) -> tuple[bool, float]:
        size = abs(math.log(other.facts.params / facts.params))
        return other.facts.family != facts.family, size

    return speeds[min(measured, key=distance).name]
