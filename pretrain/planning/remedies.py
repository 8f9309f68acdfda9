"""Smallest changes that make a run fit: other settings on these GPUs, or other GPUs.

Where some layout fits, it is the one that changes the fewest settings. Where none does, there are
several: offloading on the same GPUs, the smallest number of these GPUs, and the same number of GPUs
with more memory. Each remedy is a full plan, searched as the first was, so that its time is known.
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
"""Largest number of GPUs that is tried."""


@dataclass(frozen=True)
class Remedy:
    """A change, and the plan after it."""

    change: str
    """Settings to change, or options of `epochal plan`."""
    plan: Plan


def overrides(plan: Plan) -> list[str]:
    """Settings with which `epochal train` runs this candidate."""
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
    """Find changes that fit where the given candidate does not.

    `whole` is the machine with all of its GPUs, `larger` are other machines to try.
    """
    if given.fits:
        return ()
    if found.fitting:
        return (_least_change(given, found.fitting),)
    return tuple(_elsewhere(model, given.machine, whole, space, larger))


def _least_change(given: Plan, fitting: tuple[Plan, ...]) -> Remedy:
    """Fitting plan that changes the fewest settings; the fastest one of these."""
    before = _settings(given)

    def changed(plan: Plan) -> list[str]:
        return [word for key, word in _settings(plan).items() if word != before[key]]

    best = min(fitting, key=lambda plan: (len(changed(plan)), plan.time.total))
    return Remedy(" ".join(changed(best)), best)


def _settings(plan: Plan) -> dict[str, str]:
    """Settings in which layouts differ, as `KEY=VALUE` by key.

    The data-parallel size is not among them, because it follows from the others.
    """
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
    """Remedies where no layout fits the available GPUs."""

    def best(candidate: Machine, changed: Space) -> Plan | None:
        fitting = search(model, candidate, changed).fitting
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
