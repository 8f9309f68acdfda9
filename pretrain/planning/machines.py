"""Machines that a run is planned for: those of `configs/machine/`, and files like them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from parallel.planner.machine import Machine
from pretrain.config.groups import CONFIG_ROOT
from pretrain.config.suggest import closest
from pretrain.config.yaml_file import read_mapping
from pretrain.errors import ConfigError

MACHINES = CONFIG_ROOT / "machine"


def machine_names() -> list[str]:
    """Names of the packaged machines."""
    return sorted(path.stem for path in MACHINES.glob("*.yaml"))


def load_machine(name: str) -> Machine:
    """Load a packaged machine by name, or the one that a YAML file describes."""
    known, example = machine_names(), MACHINES / "h100x8.yaml"
    path = MACHINES / f"{name}.yaml" if name in known else Path(name)
    if not path.exists():
        hint = closest(name, known)
        raise ConfigError(
            f"unknown machine {name!r}; "
            + (f"did you mean {hint}? " if hint else "")
            + f"known: {', '.join(known)}, or a YAML file like {example}"
        )
    values = read_mapping(path, f"see {example}")
    return Machine.from_mapping(values, str(path))


def sized(machine: Machine, num_gpus: int | None) -> Machine:
    """Machine with another number of GPUs: part of a node, or whole nodes."""
    if num_gpus is None:
        return machine
    node = machine.gpus_per_node
    if num_gpus < 1 or (num_gpus > node and num_gpus % node):
        raise ConfigError(
            f"--gpus is {num_gpus}; machine {machine.name} has nodes of {node}: take 1 to {node} "
            f"or a multiple of {node}"
        )
    return replace(machine, num_nodes=-(-num_gpus // node), gpus_per_node=min(node, num_gpus))


def larger_machines(machine: Machine) -> list[Machine]:
    """Packaged machines with the same number of GPUs and more memory, least memory first."""
    by_memory: dict[float, Machine] = {}
    for name in machine_names():
        other = load_machine(name)
        if other.memory_gib > machine.memory_gib:
            best = by_memory.setdefault(other.memory_gib, other)
            if other.num_gpus == machine.num_gpus != best.num_gpus:
                by_memory[other.memory_gib] = other
    whole = machine.num_gpus % 8 == 0 or machine.num_gpus < 8
    return [sized(by_memory[size], machine.num_gpus) for size in sorted(by_memory) if whole]
