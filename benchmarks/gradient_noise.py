"""Noise of each objective's gradient once the frequencies of tokens are learned.

    python benchmarks/gradient_noise.py [--pool FOLDER] [--steps 150] [--batches 96]

A two-layer model first learns the frequencies of tokens, which all families do at once. Then the
gradient is measured on many batches without an update:

    noise scale = tr(covariance of a batch's gradient) / |mean gradient|^2 * tokens of a batch

is the batch, in tokens, at which signal and noise are equal (McCandlish et al., arXiv 1812.06162).
A step with much fewer is mostly noise. `--pool` is a folder of `epochal data prepare`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

from data_pipeline.corpus.source import SourceSettings
from data_pipeline.prepare.prepare import prepare
from data_pipeline.prepare.settings import PrepareSettings, TokenizerSettings
from data_pipeline.shards.pool import TokenPool
from data_pipeline.stream.budget import Budget
from data_pipeline.stream.stream import TokenStream
from data_pipeline.tokenizer import load_tokenizer
from parallel.layout.topology import Topology
from parallel.runtime import init_distributed
from pretrain.batch import CleanBatch
from pretrain.config.objectives import objectives
from pretrain.config.run import ModelConfig
from pretrain.data import clean_batch, token_space
from pretrain.model.initialize import initialize
from pretrain.model.transformer import Transformer
from pretrain.module import ObjectiveModule
from pretrain.noise.key import NoiseKey
from pretrain.objectives import build_objective

FAMILIES = {
    "autoregressive": {"name": "autoregressive"},
    "masked, simple": {"name": "masked", "loss": "simple"},
    "masked, elbo": {"name": "masked", "loss": "elbo"},
    "interpolating balanced, simple": {"name": "interpolating", "loss": "simple"},
    "interpolating balanced, elbo": {"name": "interpolating", "loss": "elbo"},
    "uniform, simple": {"name": "uniform", "loss": "simple"},
    "uniform, elbo": {"name": "uniform", "loss": "elbo"},
}
BATCH, LENGTH = 16, 64
LEARNING_RATE = 3e-3


def main() -> None:
    """Measure every family and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pool", type=Path, help="default: the built-in corpus")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batches", type=int, default=96)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    init_distributed(device="cpu")
    topology = Topology.build()
    pool = arguments.pool or builtin(Path("runs/gradient_noise"))
    print(f"{'objective':32} {'noise scale in tokens':>22} {'largest / median norm':>22}")
    for label, objective in FAMILIES.items():
        scale, tail = measure(topology, pool, objective, arguments.steps, arguments.batches)
        print(f"{label:32} {scale:22,.0f} {tail:22.1f}", flush=True)


def builtin(folder: Path) -> Path:
    """The built-in corpus as a pool."""
    prepare(
        PrepareSettings(
            out=folder,
            sources=(SourceSettings(path="builtin"),),
            tokenizer=TokenizerSettings(vocab_size=1024),
        )
    )
    return folder


def measure(
    topology: Topology, pool: Path, objective: dict[str, str], steps: int, batches: int
) -> tuple[float, float]:
    """Noise scale in tokens, and the largest gradient norm over the median."""
    shape = ModelConfig(
        num_layers=2,
        hidden_size=64,
        num_attention_heads=4,
        qk_norm=True,
        init_std=0.05,
        time_conditioning=objective["name"] == "uniform",
    )
    space = token_space(load_tokenizer(pool / "tokenizer.model"), shape)
    model = Transformer(shape, space, topology)
    initialize(model, seed=0)
    config = objectives.make(**objective, time_window=BATCH)  # type: ignore[arg-type]
    module = ObjectiveModule(model, build_objective(config, space))
    tokens = TokenPool(pool / "train" / "manifest.json", verify="size")
    count = (steps + batches) * BATCH
    stream = TokenStream(
        tokens, Budget(count * LENGTH, LENGTH, tokens.num_tokens), seed=0, epochs=1
    )
    optimizer = torch.optim.AdamW(module.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95))
    for step in range(steps):
        gradient(module, clean_batch(stream.read(np.arange(step * BATCH, (step + 1) * BATCH))))
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
    total, squares, norms = torch.zeros(()), 0.0, []
    for step in range(steps, steps + batches):
        clean = clean_batch(stream.read(np.arange(step * BATCH, (step + 1) * BATCH)))
        one = gradient(module, clean)
        total = total + one
        norms.append(float(one.norm()))
        squares += norms[-1] ** 2
    mean = float((total / batches).square().sum())
    variance = (squares / batches - mean) * batches / (batches - 1)
    signal = mean - variance / batches  # the mean of noise has a norm of its own
    return variance / signal * BATCH * LENGTH, max(norms) / float(np.median(norms))


def gradient(module: ObjectiveModule, clean: CleanBatch) -> torch.Tensor:
    """Gradient of the loss per token over all parameters, float64; left in `.grad` too."""
    module.zero_grad()
    batch = module.objective.corrupt(clean, NoiseKey(0, clean.position))
    loss = module(batch)
    (loss / clean.tokens.numel()).backward()
    parts = [p.grad.flatten() for p in module.parameters() if p.grad is not None]
    return torch.cat(parts).double()


if __name__ == "__main__":
    main()
