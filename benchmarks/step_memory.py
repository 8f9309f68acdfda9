"""Cost and saving of recomputation, chunks and compilation of the loss, and dropout, on one thread.

    python benchmarks/step_memory.py [--layers 6] [--hidden 256] [--length 256] [--rounds 5]
                                     [--precision float32|bfloat16]

Every row trains the same autoregressive transformer on the same tokens, forward and backward.
CPU seconds of this process, the best of the rounds, which go over the rows in turn. Bytes are those
that a forward pass takes and does not give back, by torch's profiler: what the backward pass keeps.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace

import torch
from record import hardware
from synthetic import clean_batch, configuration, random_tokens, token_space
from torch.profiler import ProfilerActivity, profile

from parallel.layout.topology import Topology
from parallel.runtime import init_distributed
from pretrain.batch import TrainBatch
from pretrain.build import build_model
from pretrain.module import ObjectiveModule
from pretrain.noise.key import NoiseKey
from pretrain.objectives import build_objective

SPACE = token_space(32_000)
ROWS = {
    "plain": "train.loss_chunk=0",
    "recompute=selective": "train.loss_chunk=0 train.recompute=selective",
    "recompute=full": "train.loss_chunk=0 train.recompute=full",
    "loss_chunk=128": "train.loss_chunk=128",
    "full, loss_chunk=128": "train.loss_chunk=128 train.recompute=full",
    "compile_loss": "train.loss_chunk=0 train.compile_loss=true",
    "compile_loss, loss_chunk=128": "train.loss_chunk=128 train.compile_loss=true",
    "dropout=0.1": "train.loss_chunk=0 model.dropout=0.1",
    "attention_dropout=0.1": "train.loss_chunk=0 model.attention_dropout=0.1",
}
"""Settings of a run by the name of the row."""


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
    modules = {name: build(topology, options, row) for name, row in ROWS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in ROWS}
    for _ in range(options.rounds):
        for name, module in modules.items():
            seconds[name].append(step_seconds(module, corrupted(module, options)))
    best = {name: min(values) for name, values in seconds.items()}
    print(f"{hardware()}, torch {torch.__version__}, {options}")
    print(f"{'':30} {'CPU s':>7} {'ratio':>6} {'MB kept':>8}")
    for name, module in modules.items():
        kept = bytes_kept(module, corrupted(module, options)) / 1e6
        print(f"{name:30} {best[name]:7.3f} {best[name] / best['plain']:6.2f} {kept:8.1f}")


def build(topology: Topology, options: argparse.Namespace, settings: str) -> ObjectiveModule:
    """The same weights in every row."""
    config = configuration(
        "model=tiny",
        "objective=autoregressive",
        f"objective.time_window={options.batch}",
        f"model.num_layers={options.layers}",
        f"model.hidden_size={options.hidden}",
        f"model.num_attention_heads={options.hidden // 64}",
        *settings.split(),
    )
    module = build_model(config, topology, build_objective(config.objective, SPACE))
    return module.to(getattr(torch, options.precision))


def corrupted(module: ObjectiveModule, options: argparse.Namespace) -> TrainBatch:
    """One batch of random tokens."""
    generator = torch.Generator().manual_seed(0)
    tokens = random_tokens(SPACE, options.batch, options.length, generator)
    clean = clean_batch(tokens, torch.arange(options.batch))
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
