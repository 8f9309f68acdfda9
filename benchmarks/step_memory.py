"""What recomputation, chunks of the loss, its compilation and dropout cost, and what they save, on
one CPU thread.

    python benchmarks/step_memory.py [--layers 6] [--hidden 256] [--length 256] [--rounds 5]
                                     [--precision float32|bfloat16]

Every row trains the same autoregressive transformer on the same tokens, forward and backward.
CPU seconds of this process, the best of the rounds, which go over the rows in turn. Bytes are those
that a forward pass takes and does not give back, by torch's profiler: what the backward pass keeps.
"""

from __future__ import annotations

import argparse
import platform
import time
from dataclasses import replace
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from parallel.layout.topology import Topology
from parallel.runtime import init_distributed
from pretrain.batch import CleanBatch, TrainBatch
from pretrain.config.objectives import objectives
from pretrain.config.run import ModelConfig
from pretrain.model.initialize import initialize
from pretrain.model.recompute import Mode, Recompute
from pretrain.model.transformer import Transformer
from pretrain.module import ObjectiveModule
from pretrain.noise.key import NoiseKey
from pretrain.objectives import build_objective
from pretrain.vocabulary import TokenSpace

VOCABULARY = 32_000
ROWS: dict[str, dict[str, Any]] = {
    "plain": {},
    "recompute=selective": {"mode": "selective"},
    "recompute=full": {"mode": "full"},
    "loss_chunk=128": {"chunk": 128},
    "full, loss_chunk=128": {"mode": "full", "chunk": 128},
    "compile_loss": {"compile_loss": True},
    "compile_loss, loss_chunk=128": {"compile_loss": True, "chunk": 128},
    "dropout=0.1": {"dropout": 0.1},
    "attention_dropout=0.1": {"attention_dropout": 0.1},
}


def main() -> None:
    """Measure all rows and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, value in {"layers": 6, "hidden": 256, "length": 256, "batch": 4, "rounds": 5}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    options = parser.parse_args()
    torch.set_num_threads(1)
    init_distributed(device="cpu")
    topology = Topology.build()
    modules = {name: build(topology, options, **row) for name, row in ROWS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in ROWS}
    for _ in range(options.rounds):
        for name, module in modules.items():
            seconds[name].append(step_seconds(module, corrupted(module, options)))
    best = {name: min(values) for name, values in seconds.items()}
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, {options}")
    print(f"{'':30} {'CPU s':>7} {'ratio':>6} {'MB kept':>8}")
    for name, module in modules.items():
        kept = bytes_kept(module, corrupted(module, options)) / 1e6
        print(f"{name:30} {best[name]:7.3f} {best[name] / best['plain']:6.2f} {kept:8.1f}")


def build(
    topology: Topology,
    options: argparse.Namespace,
    mode: Mode = "none",
    chunk: int = 0,
    compile_loss: bool = False,
    **model: float,
) -> ObjectiveModule:
    """The same weights in every row."""
    space = TokenSpace(VOCABULARY, VOCABULARY, 0, 4, 5, (0, 1, 2, 3, 4))
    shape = {
        "num_layers": options.layers,
        "hidden_size": options.hidden,
        "num_attention_heads": options.hidden // 64,
    }
    config = ModelConfig(**shape, **model)  # type: ignore[arg-type]
    network = Transformer(config, space, topology, recompute=Recompute(mode))
    initialize(network, seed=0)
    settings = objectives.make(name="autoregressive", time_window=options.batch)
    objective = build_objective(settings, space)
    module = ObjectiveModule(network, objective, loss_chunk=chunk, compile_loss=compile_loss)
    return module.to(getattr(torch, options.precision))


def corrupted(module: ObjectiveModule, options: argparse.Namespace) -> TrainBatch:
    """One batch of random tokens."""
    b, s = options.batch, options.length
    g = torch.Generator().manual_seed(0)
    clean = CleanBatch(
        tokens=torch.randint(5, VOCABULARY, (b, s), generator=g),
        position=torch.arange(b),
        segment=torch.zeros(b, s, dtype=torch.int32),
        valid=torch.ones(b, s, dtype=torch.bool),
        all_valid=True,
    )
    noise = NoiseKey(0, clean.position)
    batch = module.objective.corrupt(clean, noise)
    return replace(batch, dropout_seed=noise.number("dropout"))


def step_seconds(module: ObjectiveModule, batch: TrainBatch) -> float:
    """CPU seconds of forward and backward pass."""
    start = time.process_time()
    module(batch).backward()
    spent = time.process_time() - start
    module.zero_grad(set_to_none=True)
    return spent


def bytes_kept(module: ObjectiveModule, batch: TrainBatch) -> int:
    """Memory that is taken for the backward pass."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as measured:
        loss = module(batch)
    events = measured.profiler.kineto_results.events()  # type: ignore[union-attr]
    return sum(event.nbytes() for event in events) - int(loss.nbytes)


if __name__ == "__main__":
    main()
