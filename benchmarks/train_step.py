"""A training step beside Hugging Face transformers: tokens for each CPU second, in one run.

    python benchmarks/train_step.py [--bodies 10M 50M] [--repeats 5] [--json FILE]

Needs transformers (in the extras `dev` and `eval`). One thread, float32, the same shape everywhere
(tied embedding, SwiGLU, rotary positions, RMSNorm, SDPA), the same tokens, gradients clipped to
norm 1, AdamW:

    transformers    LlamaForCausalLM, labels given, torch AdamW, `fused` unless said otherwise;
                    `memory kept` with the allocator's setting that `epochal train` makes
    hand-written    our transformer in a loop of ten lines, without DeepSpeed
    engine          the step of `epochal train`, through DeepSpeed; corruption on the host included

Each contestant is a process of its own, which steps when its turn comes and counts its own CPU
seconds. Rounds go over the contestants in turn, so that a busy machine slows all of them alike, and
the median over the rounds of the ratio within a round is reported. Operations are counted from the
matrices (backward twice forward, causal attention half, evaluated rows of the head only). The
machine's rate is that of square products of 1,024, measured in every round.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from parallel.engine.base import EngineConfig
from parallel.engine.build import build_engine
from parallel.layout.topology import Topology
from parallel.runtime import init_distributed, keep_freed_memory
from pretrain.batch import CleanBatch
from pretrain.config.objectives import objectives
from pretrain.config.run import ModelConfig, OptimizerConfig
from pretrain.model.initialize import initialize
from pretrain.model.transformer import Transformer
from pretrain.module import ObjectiveModule
from pretrain.noise.key import NoiseKey
from pretrain.objectives import build_objective
from pretrain.study.flops import train_flops_per_token
from pretrain.training.parameter_groups import parameter_groups
from pretrain.vocabulary import TokenSpace

VOCABULARY = 32768
SPACE = TokenSpace(VOCABULARY, VOCABULARY, 0, 4, 5, (0, 1, 2, 3, 4))
BODIES = {"10M": (12, 256, 4), "50M": (16, 512, 8)}
"""Layers, width and heads, by parameters without embedding."""
TARGETS = {
    ("10M", "engine, autoregressive"): 1.08,
    ("50M", "engine, autoregressive"): 1.08,
    ("10M", "engine, masked"): 1.45,
    ("50M", "engine, masked"): 1.3,
}
"""Tokens for each CPU second relative to transformers, at least."""
BASE, KEPT, FOREACH = "transformers", "transformers, memory kept", "transformers, foreach"
LR = 1e-4


@dataclass(frozen=True)
class Shape:
    """What is trained, on what."""

    model: ModelConfig
    batch: int
    length: int

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.batch * self.length


def batches(shape: Shape) -> Iterator[CleanBatch]:
    """The same clean tokens at ever new positions of the run."""
    generator = torch.Generator().manual_seed(0)
    size = (shape.batch, shape.length)
    tokens = torch.randint(5, VOCABULARY, size, generator=generator)
    position = torch.arange(shape.batch)
    while True:
        yield CleanBatch(
            tokens=tokens,
            position=position,
            segment=torch.zeros_like(tokens, dtype=torch.int32),
            valid=torch.ones_like(tokens, dtype=torch.bool),
            all_valid=True,
        )
        position = position + shape.batch


def transformers_step(shape: Shape, fused: bool) -> Callable[[], None]:
    """A step of LlamaForCausalLM, as its documentation writes a loop."""
    from transformers import LlamaConfig, LlamaForCausalLM

    m = shape.model
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=m.hidden_size,
        intermediate_size=m.ffn_size,
        num_hidden_layers=m.num_layers,
        num_attention_heads=m.num_attention_heads,
        num_key_value_heads=m.query_groups,
        max_position_embeddings=shape.length,
        tie_word_embeddings=True,
        attn_implementation="sdpa",
        use_cache=False,
    )
    model = LlamaForCausalLM(config).train()
    how = {"fused": True} if fused else {"foreach": True}
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.1, **how)
    source = batches(shape)

    def step() -> None:
        tokens = next(source).tokens
        model(input_ids=tokens, labels=tokens).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def our_module(shape: Shape) -> tuple[ObjectiveModule, dict[str, Any]]:
    """The transformer, and the objectives that take turns on it."""
    families = {
        name: build_objective(objectives.make(name=name, time_window=shape.batch), SPACE)
        for name in ("autoregressive", "masked")
    }
    model = Transformer(shape.model, SPACE, Topology.build())
    initialize(model, seed=0)
    return ObjectiveModule(model, families["autoregressive"]), families


def loop_steps(shape: Shape) -> dict[str, Callable[[], None]]:
    """Our module in a loop written by hand."""
    module, families = our_module(shape)
    groups = parameter_groups(module, OptimizerConfig())
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95), fused=True)
    source = batches(shape)

    def step(name: str) -> None:
        clean = next(source)
        module.objective = families[name]
        batch = module.objective.corrupt(clean, NoiseKey(0, clean.position))
        (module(batch) / clean.tokens.numel()).backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return {f"hand-written, {name}": lambda name=name: step(name) for name in families}


def engine_steps(shape: Shape) -> dict[str, Callable[[], None]]:
    """The step of `epochal train` on one rank."""
    module, families = our_module(shape)
    engine = build_engine(
        module,
        parameter_groups(module, OptimizerConfig()),
        EngineConfig(
            zero_stage=1, precision="float32", micro_batch_size=shape.batch, num_microbatches=1
        ),
        Topology.build(),
    )
    source = batches(shape)

    def step(name: str) -> None:
        clean = next(source)
        module.objective = families[name]
        batch = module.objective.corrupt(clean, NoiseKey(0, clean.position))
        engine.step([batch], clean.tokens.numel(), LR)

    return {f"engine, {name}": lambda name=name: step(name) for name in families}


def product_rate(size: int = 1024, count: int = 20) -> float:
    """Operations a CPU second of square float32 products."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    out = torch.empty(size, size)
    torch.mm(a, b, out=out)
    start = time.process_time()
    for _ in range(count):
        torch.mm(a, b, out=out)
    return 2.0 * size**3 * count / (time.process_time() - start)


CONTESTANTS: dict[str, Callable[[Shape], dict[str, Callable[[], None]]]] = {
    BASE: lambda shape: {BASE: transformers_step(shape, fused=True)},
    KEPT: lambda shape: {KEPT: transformers_step(shape, fused=True)},
    FOREACH: lambda shape: {FOREACH: transformers_step(shape, fused=False)},
    "hand-written": loop_steps,
    "engine": engine_steps,
}
"""Processes, and the steps that each of them offers."""


def serve(contestant: str, shape: Shape, connection: Connection) -> None:
    """A contestant's process: names of its steps, then the CPU seconds of each one asked for."""
    torch.set_num_threads(1)
    if contestant == KEPT:
        keep_freed_memory()
    if contestant not in (BASE, KEPT, FOREACH):
        init_distributed(device="cpu")
    steps = CONTESTANTS[contestant](shape)
    for step in steps.values():
        step()  # kernels and allocators warm up
        step()
    connection.send(list(steps))
    while (name := connection.recv()) is not None:
        start = time.process_time()
        steps[name]()
        connection.send(time.process_time() - start)


def measure(shape: Shape, repeats: int) -> tuple[dict[str, list[float]], list[float]]:
    """CPU seconds of each contestant's step and the machine's rate, round by round."""
    context = multiprocessing.get_context("spawn")
    offers: list[tuple[Connection, list[str]]] = []
    processes = []
    for contestant in CONTESTANTS:
        ours, theirs = context.Pipe()
        processes.append(context.Process(target=serve, args=(contestant, shape, theirs)))
        processes[-1].start()
        theirs.close()  # a contestant that dies is then an EOFError here
        offers.append((ours, ours.recv()))
    seconds: dict[str, list[float]] = {name: [] for _, names in offers for name in names}
    rates = []
    for _ in range(repeats):
        rates.append(product_rate())
        for connection, names in offers:
            for name in names:
                connection.send(name)
                seconds[name].append(connection.recv())
    for (connection, _), process in zip(offers, processes, strict=True):
        connection.send(None)
        process.join()
    return seconds, rates


def report(body: str, shape: Shape, seconds: dict[str, list[float]], rates: list[float]) -> None:
    """The table of one body."""
    m, rate = shape.model, statistics.median(rates)
    print(
        f"\n{body} body: {m.num_layers} layers of {m.hidden_size}, vocabulary {VOCABULARY:,}, "
        f"{shape.batch} x {shape.length} tokens; square products {rate / 1e9:.1f} GFLOP/s"
    )
    print(
        f"{'contestant':30} {'s/step':>7} {'tokens/s':>9} {'x HF':>6} {'x kept':>6} "
        f"{'target':>8} {'rate':>6}"
    )
    for name, values in seconds.items():
        ratio = relative(seconds[BASE], values)
        target = TARGETS.get((body, name))
        flops = train_flops_per_token(
            m,
            VOCABULARY,
            shape.length,
            causal="masked" not in name,
            head_share=0.5 if "masked" in name else 1.0,
        )
        share = statistics.median(flops * shape.tokens / s for s in values) / rate
        print(
            f"{name:30} {statistics.median(values):7.3f} "
            f"{shape.tokens / statistics.median(values):9.0f} {ratio:6.3f} "
            f"{relative(seconds[KEPT], values):6.3f} "
            f"{f'>= {target}' if target else '':>8} {share:6.1%}"
        )
    for name in ("autoregressive", "masked"):
        loop, engine = seconds[f"hand-written, {name}"], seconds[f"engine, {name}"]
        print(f"overhead of the engine, {name}: {relative(engine, loop) - 1.0:+.1%} (below 3 %)")


def relative(numerator: list[float], denominator: list[float]) -> float:
    """Median over the rounds of the ratio within a round."""
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))


def main() -> None:
    """Measure, print a table a body, and write the seconds as JSON where asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bodies", nargs="*", choices=tuple(BODIES), default=list(BODIES))
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{platform.processor() or platform.machine()}, 1 thread, torch {torch.__version__}")
    results = {}
    for body in arguments.bodies:
        layers, hidden, heads = BODIES[body]
        model = ModelConfig(num_layers=layers, hidden_size=hidden, num_attention_heads=heads)
        shape = Shape(model, arguments.batch, arguments.length)
        seconds, rates = measure(shape, arguments.repeats)
        report(body, shape, seconds, rates)
        results[body] = {"seconds": seconds, "product_flops_per_second": rates}
    if arguments.json:
        settings = {k: v for k, v in vars(arguments).items() if k != "json"}
        arguments.json.write_text(json.dumps({"settings": settings, "bodies": results}, indent=1))


if __name__ == "__main__":
    main()
