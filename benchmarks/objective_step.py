"""Cost of a training step for each objective, relative to autoregressive: time and peak memory.

    python benchmarks/objective_step.py [--device cuda] [--repeats 5] [--json FILE]

Every family trains the same transformer on the same tokens: corruption, forward and backward pass.
The optimizer is left out, because it costs all of them the same. Rounds go over the families in
turn, so that a busy machine slows all of them alike; on the CPU it counts CPU seconds of this
process on one thread. The median of the rounds is reported. `--families masked masked+5` also
measures masked with a short convolution of five tokens.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from record import hardware
from synthetic import configuration, same_tokens, token_space

from pretrain.noise.key import NoiseKey
from pretrain.objectives import build_objective
from pretrain.vocabulary import TokenSpace

FAMILIES = (
    "autoregressive",
    "masked",
    "masked_simple",
    "uniform",
    "uniform_simple",
    "duo",
    "distillation",
    "interpolating",
    "gidd",
    "block",
    "esoteric",
    "esoteric_hybrid",
    "gaussian",
)
"""Options of configs/objective that are measured."""
TARGETS = {"masked": 0.8, "uniform": 1.25, "interpolating": 1.3, "block": 2.2}
"""Largest cost relative to autoregressive that a family should have."""


def main() -> None:
    """Measure, print a table, and write it as JSON where asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=32768)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--families", nargs="*", default=FAMILIES)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = measure(arguments)
    base = rows["autoregressive"]
    print(f"{hardware(arguments.device)}, {arguments.device}, torch {torch.__version__}")
    print(f"{'objective':20} {'seconds':>8} {'x AR':>6} {'target':>7} {'MiB':>7} {'x AR':>6}")
    for name, (seconds, memory) in rows.items():
        target = f"<= {TARGETS[name]}" if name in TARGETS else ""
        print(
            f"{name:20} {seconds:8.3f} {seconds / base[0]:6.2f} {target:>7} "
            f"{memory / 2**20:7.0f} {memory / base[1]:6.2f}"
        )
    if arguments.json:
        settings = {k: v for k, v in vars(arguments).items() if k != "json"}
        arguments.json.write_text(json.dumps({"settings": settings, "steps": rows}, indent=1))


def measure(arguments: argparse.Namespace) -> dict[str, tuple[float, int]]:
    """Seconds and peak bytes above the resting state of one step, by family."""
    torch.set_num_threads(1)
    device = torch.device(arguments.device)
    space = token_space(arguments.vocabulary)
    steps = {
        name: steps_of(name, arguments, space, device)
        for name in dict.fromkeys(("autoregressive", *arguments.families))
    }
    for step in steps.values():
        next(step)  # kernels and allocators warm up
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    memory: dict[str, list[int]] = {name: [] for name in steps}
    for _ in range(arguments.repeats):
        for name, step in steps.items():
            start = clock(device)
            next(step)
            seconds[name].append(clock(device) - start)
    for name, step in steps.items():  # apart: pages that were given back must be filled again
        resting = reset_peak(device)
        next(step)
        memory[name].append(peak(device) - resting)
    return {n: (statistics.median(seconds[n]), max(memory[n])) for n in steps}


def steps_of(
    name: str, arguments: argparse.Namespace, space: TokenSpace, device: torch.device
) -> Iterator[None]:
    """One training step of a family each time it is advanced."""
    module, family = build(name, arguments, space, device)
    for clean in same_tokens(space, arguments.batch, arguments.length):
        batch = family.corrupt(clean, NoiseKey(0, clean.position)).to(device)
        (module(batch) / clean.tokens.numel()).backward()
        module.zero_grad(set_to_none=True)
        yield


def build(
    name: str, arguments: argparse.Namespace, space: TokenSpace, device: torch.device
) -> tuple[Any, Any]:
    """Module and objective of an option of configs/objective, `+K` with a short convolution."""
    from parallel.layout.topology import Topology
    from parallel.runtime import init_distributed
    from pretrain.build import build_model
    from pretrain.model.teacher import Teacher
    from pretrain.model.transformer import Transformer

    init_distributed(device=device.type)
    option, _, kernel = name.partition("+")
    config = configuration(
        "model=tiny",
        f"model.short_convolution={kernel or 0}",
        f"objective={option}",
        f"objective.time_window={arguments.batch}",
        f"model.num_layers={arguments.layers}",
        f"model.hidden_size={arguments.hidden}",
        f"model.num_attention_heads={arguments.heads}",
    )
    family = build_objective(config.objective, space, static_rows=device.type == "cuda")
    topology = Topology.build()
    module = build_model(config, topology, family).to(device)
    if family.teacher:
        module.teacher = Teacher(Transformer(config.model, space, topology).to(device))
        module.teacher.renew(module.model)
    return module, family


def clock(device: torch.device) -> float:
    """CPU seconds of this process, or wall-clock seconds once the device is idle."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def reset_peak(device: torch.device) -> int:
    """Forget the largest memory so far; returns what is in use now, in bytes."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    ctypes.CDLL(None).malloc_trim(0)  # glibc: what earlier steps freed goes back to the kernel
    Path("/proc/self/clear_refs").write_text("5")  # Linux: resets the high-water mark
    return status_bytes("VmRSS")


def peak(device: torch.device) -> int:
    """Largest memory in use since `reset_peak`, in bytes."""
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else status_bytes("VmHWM")


def status_bytes(field: str) -> int:
    """A field of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise LookupError(field)


if __name__ == "__main__":
    main()
