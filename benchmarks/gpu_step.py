"""A training step on a GPU: tokens a second, MFU, peak memory, and where the time goes.

    python benchmarks/gpu_step.py [--models 127m medium 1.7b] [--compile on off] [--json FILE]
    python benchmarks/gpu_step.py --compile-loss off on     a row of each
    python benchmarks/gpu_step.py --dry-run      a tiny shape on the CPU: proves the script, no more

Each row is the step of `epochal train` on one GPU (bfloat16, ZeRO 1, fused AdamW, corruption on the
host included), with the micro-batch, recompute setting and choice of `--compile` that gave most
tokens a second among those that fit. Operations are counted from the matrices: backward twice
forward, causal attention half, the head only at rows that carry weight, recomputed work never. MFU
is given against the dense bfloat16 rate of the data sheet and against square products of 8,192
timed in the same run.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import platform
import re
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from pretrain.batch import CleanBatch, TrainBatch
from pretrain.config.compose import compose
from pretrain.config.run import Config, ModelConfig
from pretrain.noise.key import NoiseKey
from pretrain.objectives import Objective, build_objective
from pretrain.study.flops import train_flops_per_token
from pretrain.vocabulary import TokenSpace

DENSE_FLOPS = 989e12
"""Dense bfloat16 operations a second of an H100 SXM or H200; 1,979 is the rate with sparsity."""
OBJECTIVES = ("autoregressive", "masked", "uniform")
MICRO_BATCHES = (64, 32, 16, 8, 4, 2, 1)
RECOMPUTE = ("none", "selective", "full")
KERNEL_CLASSES = (
    ("attention", r"flash|fmha|attention|flex|sdpa"),
    ("optimizer", r"adam|multi_tensor"),
    ("collective", r"nccl|all_?reduce|all_?gather|reduce_scatter"),
    ("matrix product", r"gemm|gemv|nvjet|cutlass|xmma|wgmma|splitk|aten::(mm|addmm|bmm)$"),
    ("copy", r"memcpy|memset|copy|fill|zero|cat"),
    ("norm, softmax, sum", r"norm|softmax|reduce|amax|aten::sum|logsumexp"),
    ("gather, scatter", r"index|gather|scatter|embedding|sort|radix"),
    ("elementwise", r"elementwise|triton|aten::(mul|add|sub|exp|div|silu|addcmul|neg|where)"),
)
"""Classes of kernels, the first whose pattern is found in the lower-case name."""


@dataclass(frozen=True)
class Setting:
    """What is varied to find the fastest step."""

    micro_batch: int
    recompute: str
    compile: str = "off"
    compile_loss: str = "off"


@dataclass(frozen=True)
class Row:
    """What was measured for a model and an objective."""

    model: str
    objective: str
    setting: Setting
    seconds: float
    """Median of a step."""
    tokens_per_second: float
    flops_per_token: float
    peak_bytes: int
    kernels: dict[str, float] = field(default_factory=dict)
    """Share of the device's busy time by class."""

    @property
    def flops(self) -> float:
        """Counted operations a second."""
        return self.tokens_per_second * self.flops_per_token


def main() -> int:
    """Measure, print, and write JSON where asked to; 3 where there is no GPU."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="*", default=["127m", "medium", "1.7b"])
    parser.add_argument("--objectives", nargs="*", default=list(OBJECTIVES))
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=32768)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--compile", nargs="*", choices=("on", "off"), default=["off"])
    parser.add_argument("--compile-loss", nargs="*", choices=("on", "off"), default=["off"])
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if not (arguments.dry_run or torch.cuda.is_available()):
        print("this benchmark needs an NVIDIA GPU; --dry-run proves it on the CPU", file=sys.stderr)
        return 3
    if arguments.dry_run:
        arguments.models, arguments.length, arguments.vocabulary = ["tiny"], 32, 256
        arguments.steps = 2
    device = torch.device("cpu" if arguments.dry_run else "cuda")
    rate = product_rate(device, 256 if arguments.dry_run else 8192)
    rows = [
        fastest(model, objective, compile_loss, arguments, device)
        for model in arguments.models
        for objective in arguments.objectives
        for compile_loss in arguments.compile_loss
    ]
    print(table(rows, rate, arguments, device_name(device)))
    if arguments.json:
        settings = {k: v for k, v in vars(arguments).items() if k != "json"}
        found = {"settings": settings, "product_flops": rate, "rows": [asdict(r) for r in rows]}
        arguments.json.write_text(json.dumps(found, indent=1))
    return 0


def fastest(
    model: str, objective: str, compile_loss: str, arguments: Any, device: torch.device
) -> Row:
    """The row with most tokens a second over micro-batches and recompute settings that fit."""
    rows = []
    sizes = (2,) if arguments.dry_run else MICRO_BATCHES
    for recompute, compiled in itertools.product(RECOMPUTE, arguments.compile):
        fitting = 0
        for size in sizes:
            setting = Setting(size, recompute, compiled, compile_loss)
            row = measure(model, objective, setting, arguments, device)
            rows += [row] if row else []
            fitting += row is not None
            if fitting == 2:  # half of what fits can be faster, a quarter never was
                break
    assert rows, f"{model} does not fit at a micro-batch of {sizes[-1]} with any recompute setting"
    best = max(rows, key=lambda row: row.tokens_per_second)
    profiled = measure(model, objective, best.setting, arguments, device, profile=True)
    assert profiled is not None, "it fitted before"
    return Row(**{**best.__dict__, "kernels": profiled.kernels})


def measure(
    model: str,
    objective: str,
    setting: Setting,
    arguments: Any,
    device: torch.device,
    profile: bool = False,
) -> Row | None:
    """Steps of one setting, or None where memory does not suffice."""
    try:
        return Steps(model, objective, setting, arguments, device).row(profile)
    except torch.OutOfMemoryError:
        return None
    finally:
        release(device)


def release(device: torch.device) -> None:
    """Drop engine, groups and cached memory before the next setting."""
    from parallel.runtime import shutdown

    shutdown()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


class Steps:
    """An engine of one setting, and the steps that are timed on it."""

    def __init__(
        self, model: str, objective: str, setting: Setting, arguments: Any, device: torch.device
    ) -> None:
        from parallel.runtime import init_distributed

        init_distributed(device="cuda" if device.type == "cuda" else "cpu")
        self.names, self.setting, self.device = (model, objective), setting, device
        self.arguments = arguments
        self.config = configuration(model, objective, setting, arguments)
        v = arguments.vocabulary
        self.space = TokenSpace(v, v, 0, 4, 5, (0, 1, 2, 3, 4))
        self.objective = build_objective(
            self.config.objective, self.space, static_rows=device.type == "cuda"
        )
        self.engine = build(self.config, self.objective, device)
        self.position = torch.arange(setting.micro_batch)
        self.rows_evaluated = self.positions = 0

    def batch(self) -> TrainBatch:
        """The next corrupted batch, on the device."""
        size = (self.setting.micro_batch, self.arguments.length)
        tokens = torch.randint(5, self.space.vocab_size, size)
        clean = CleanBatch(
            tokens=tokens,
            position=self.position,
            segment=torch.zeros_like(tokens, dtype=torch.int32),
            valid=torch.ones_like(tokens, dtype=torch.bool),
            all_valid=True,
        )
        batch = self.objective.corrupt(clean, NoiseKey(0, self.position))
        self.position = self.position + self.setting.micro_batch
        self.rows_evaluated += int((batch.weight != 0).sum())
        self.positions += tokens.numel()
        return batch.to(self.device)

    def step(self) -> None:
        """One optimizer step."""
        tokens = self.setting.micro_batch * self.arguments.length
        self.engine.step([self.batch()], tokens, 1e-4)

    def row(self, profile: bool) -> Row:
        """Time steps after two that warm up, or profile two."""
        self.step()
        self.step()
        kernels = kernel_shares(self.profiled()) if profile else {}
        seconds = [self.timed() for _ in range(1 if profile else self.arguments.steps)]
        median = statistics.median(seconds)
        return Row(
            *self.names,
            setting=self.setting,
            seconds=median,
            tokens_per_second=self.setting.micro_batch * self.arguments.length / median,
            flops_per_token=counted_flops(
                self.config.model,
                self.space.padded_vocab_size,
                self.arguments.length,
                self.objective,
                self.rows_evaluated / self.positions,
            ),
            peak_bytes=torch.cuda.max_memory_allocated() if self.device.type == "cuda" else 0,
            kernels=kernels,
        )

    def timed(self) -> float:
        """Seconds of a step, the device idle before and after."""
        synchronise(self.device)
        start = time.perf_counter()
        self.step()
        synchronise(self.device)
        return time.perf_counter() - start

    def profiled(self) -> list[tuple[str, float]]:
        """(kernel, microseconds) of two steps; on the CPU operations instead of kernels."""
        from torch.profiler import ProfilerActivity
        from torch.profiler import profile as torch_profile

        cuda = self.device.type == "cuda"
        activity = ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU
        with torch_profile(activities=[activity]) as recorded:
            self.step()
            self.step()
            synchronise(self.device)
        return [
            (e.key, float(e.self_device_time_total if cuda else e.self_cpu_time_total))
            for e in recorded.key_averages()
        ]


def configuration(model: str, objective: str, setting: Setting, arguments: Any) -> Config:
    """The run's configuration; the paths are never opened."""
    overrides = [
        f"model={model}",
        f"objective={objective}",
        f"objective.time_window={setting.micro_batch}",
        f"data.seq_length={arguments.length}",
        f"train.recompute={setting.recompute}",
        f"train.compile={'true' if setting.compile == 'on' else 'false'}",
        f"train.compile_loss={'true' if setting.compile_loss == 'on' else 'false'}",
        f"train.global_batch_size={setting.micro_batch}",
        "train.precision=bfloat16",
        "parallel.zero_stage=1",
    ]
    return compose(
        [*overrides, *(f"data.{k}=unused" for k in ("train", "validation", "tokenizer"))]
    )


def build(config: Config, objective: Objective, device: torch.device) -> Any:
    """The engine of a configuration on one rank."""
    from parallel.engine.base import EngineConfig
    from parallel.engine.build import build_engine
    from parallel.layout.topology import Topology
    from pretrain.build import build_model
    from pretrain.training.parameter_groups import parameter_groups

    topology = Topology.build(zero_stage=1, precision="bfloat16")
    module = build_model(config, topology, objective).to(device)
    if config.train.compile is True:
        module.model.compile_layers()
    engine = EngineConfig(
        zero_stage=1,
        precision="bfloat16",
        micro_batch_size=config.train.global_batch_size,
        num_microbatches=1,
        optimizer=config.optimizer.spec(),
    )
    return build_engine(module, parameter_groups(module, config.optimizer), engine, topology)


def counted_flops(
    model: ModelConfig, vocabulary: int, length: int, objective: Objective, head_share: float
) -> float:
    """Operations of a token, forward and backward, with the head at `head_share` of positions."""
    return train_flops_per_token(
        model,
        vocabulary,
        length,
        causal=objective.causal,
        head_share=head_share,
        positions_per_token=objective.positions_per_token,
    )


def kernel_class(name: str) -> str:
    """Class of a kernel by its name."""
    found = (kind for kind, pattern in KERNEL_CLASSES if re.search(pattern, name.lower()))
    return next(found, "other")


def kernel_shares(kernels: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Share of the time by class, largest first; classes without time are left out."""
    total: dict[str, float] = defaultdict(float)
    for name, microseconds in kernels:
        total[kernel_class(name)] += microseconds
    every = sum(total.values()) or 1.0
    ordered = sorted(total.items(), key=lambda item: -item[1])
    return {kind: time_ / every for kind, time_ in ordered if time_ > 0}


def table(rows: list[Row], rate: float, arguments: Any, hardware: str) -> str:
    """The table in Markdown, with everything that its figures depend on."""
    note = " (dry run: figures mean nothing)" if arguments.dry_run else ""
    lines = [
        f"{hardware}, torch {torch.__version__}, commit {commit()}{note}",
        f"bfloat16, one device, sequence {arguments.length:,}, vocabulary {arguments.vocabulary:,}",
        f"denominators: {DENSE_FLOPS / 1e12:.0f} TFLOP/s dense; square products of this run "
        f"{rate / 1e12:.1f} TFLOP/s",
        "",
        "| model | objective | micro-batch | recompute | compile | compile loss | tokens/s | "
        "MFU of 989 | of products | peak GiB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row.model} | {row.objective} | {row.setting.micro_batch} | "
            f"{row.setting.recompute} | {row.setting.compile} | {row.setting.compile_loss} | "
            f"{row.tokens_per_second:,.0f} | {row.flops / DENSE_FLOPS:.1%} | "
            f"{row.flops / rate:.1%} | {row.peak_bytes / 2**30:.1f} |"
        )
    lines += [
        "",
        "| model | objective | compile loss | device time by class of kernels |",
        "|---|---|---|---|",
    ]
    for row in rows:
        shares = ", ".join(f"{kind} {share:.0%}" for kind, share in row.kernels.items())
        lines.append(f"| {row.model} | {row.objective} | {row.setting.compile_loss} | {shares} |")
    return "\n".join(lines)


def product_rate(device: torch.device, size: int, count: int = 20) -> float:
    """Operations a second of square bfloat16 products."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        torch.mm(a, b)
    synchronise(device)
    start = time.perf_counter()
    for _ in range(count):
        torch.mm(a, b)
    synchronise(device)
    return 2.0 * size**3 * count / (time.perf_counter() - start)


def synchronise(device: torch.device) -> None:
    """Wait until the device is idle."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's architecture."""
    return torch.cuda.get_device_name() if device.type == "cuda" else platform.machine()


def commit() -> str:
    """Commit of this checkout, marked where it has changes; `unknown` outside git."""
    root = Path(__file__).resolve().parents[1]
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=10"]
    found = subprocess.run(command, capture_output=True, text=True)
    return found.stdout.strip() or "unknown"


if __name__ == "__main__":
    sys.exit(main())
