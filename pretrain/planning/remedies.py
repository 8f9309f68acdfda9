"""The least that would make a run fit: other settings on these GPUs, or other GPUs.

Where some layout fits, the one that changes fewest settings of the given one. Where none does:
offloading on the same GPUs, the fewest GPUs of this kind, and as many GPUs with more memory. Every
remedy is a plan of its own, searched as the first was, so that its price is known too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from parallel.planner.costs import ModelCost
from parallel.planner.machine import Machine
from parallel.planner.plan import Plan, Search, Space, search
from pretrain.planning.machines import sized

LARGEST = 4096
"""GPUs that are tried at most."""


@dataclass(frozen=True)
class Remedy:
    """A change and what it leads to."""

    change: str
    """Settings to change, or what to take instead."""
    plan: Plan


def overrides(plan: Plan) -> list[str]:
    """The settings with which `epochal train` runs this candidate."""
    c, layout = plan.candidate, plan.candidate.layout
    values: dict[str, Any] = {"parallel.data_parallel_size": layout.data_parallel_size}
    if layout.tensor_parallel_size > 1:
        values["parallel.tensor_parallel_size"] = layout.tensor_parallel_size
        values["parallel.sequence_parallel"] = str(layout.sequence_parallel).lower()
    if layout.pipeline_parallel_size > 1:
        values["parallel.pipeline_parallel_size"] = layout.pipeline_parallel_size
    if layout.context_parallel_size > 1:
        values["parallel.context_parallel_size"] = layout.context_parallel_size
    values["parallel.zero_stage"] = c.zero_stage
    if c.offloads:
        values["parallel.offload"] = c.offload
    values["train.micro_batch_size"] = c.micro_batch_size
    values["train.recompute"] = c.recompute
    return [f"{key}={value}" for key, value in values.items()]


def remedies(
    model: ModelCost,
    whole: Machine,
    space: Space,
    given: Plan,
    found: Search,
    larger: list[Machine],
) -> tuple[Remedy, ...]:
    """What would fit where the given candidate does not.

    `whole` is the machine before GPUs were taken from it, `larger` are other machines to try.
    """
    if given.fits:
        return ()
    if found.fitting:
        return (_least_change(given, found.fitting),)
    return tuple(_elsewhere(model, given.machine, whole, space, larger))


def _least_change(given: Plan, fitting: tuple[Plan, ...]) -> Remedy:
    """The fitting plan with fewest settings of its own; the fastest of those."""
    have = _settings(given)

    def changed(plan: Plan) -> list[str]:
        return [word for key, word in _settings(plan).items() if word != have[key]]

    best = min(fitting, key=lambda plan: (len(changed(plan)), plan.time.total))
    return Remedy(" ".join(changed(best)), best)


def _settings(plan: Plan) -> dict[str, str]:
    """Every setting that layouts differ in, as `KEY=VALUE` by key; the data-parallel size follows
    from the others."""
    c, layout = plan.candidate, plan.candidate.layout
    values = {
        "parallel.tensor_parallel_size": layout.tensor_parallel_size,
        "parallel.sequence_parallel": str(layout.sequence_parallel).lower(),
        "parallel.pipeline_parallel_size": layout.pipeline_parallel_size,
        "parallel.context_parallel_size": layout.context_parallel_size,
        "parallel.zero_stage": c.zero_stage,
        "train.micro_batch_size": c.micro_batch_size,
        "train.recompute": c.recompute,
        "train.recompute_layers": "null" if c.recompute_layers is None else c.recompute_layers,
    }
    return {key: f"{key}={value}" for key, value in values.items()}


def _elsewhere(
    model: ModelCost, machine: Machine, whole: Machine, space: Space, larger: list[Machine]
) -> Iterator[Remedy]:
    """Where no layout fits the GPUs that are there."""

    def best(there: Machine, changed: Space) -> Plan | None:
        fitting = search(model, there, changed).fitting
        return fitting[0] if fitting else None

    if space.offload == "none":
        plan = best(machine, replace(space, offload="cpu"))
        if plan is not None:
            yield Remedy(" ".join(overrides(plan)), plan)
    gpus = 2 * space.num_gpus
    while gpus <= LARGEST:
        plan = best(sized(whole, gpus), replace(space, num_gpus=gpus))
        if plan is not None:
            yield Remedy(f"--gpus {gpus}", plan)
            break
        gpus *= 2
    for other in larger:
        plan = best(other, space)
        if plan is not None:
            yield Remedy(f"--machine {other.name} --gpus {space.num_gpus}", plan)
            break
