"""The engine of one model, and optimizer steps on it whose setting changes from row to row.

The engine is that of `epochal train` on one GPU in bfloat16, and the next batch is corrupted while
the device works, as there. Building it takes far longer than a step, so that micro-batch,
recompute setting, compilation and objective are changed on the engine that exists.
"""

from __future__ import annotations

import gc
import itertools
import statistics
import time
from collections import deque
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from gpu_day.facts import synchronise
from gpu_day.plan import Plan, Row
from synthetic import clean_batch, configuration, random_tokens, token_space

from parallel.engine.base import StepResult
from parallel.engine.build import build_engine
from parallel.layers import mark_parallel_layers
from parallel.layout.topology import Topology
from parallel.runtime import init_distributed, shutdown
from pretrain import build
from pretrain.batch import TrainBatch
from pretrain.config.run import Config, ModelConfig
from pretrain.model.recompute import Recompute
from pretrain.noise.key import NoiseKey
from pretrain.objectives import Objective, build_objective
from pretrain.study.flops import train_flops_per_token
from pretrain.training.parameter_groups import parameter_groups

LR = 1e-4
WITHOUT_PARAMETERS = ("autoregressive", "masked", "uniform", "interpolating", "block")
"""Objectives without a network or a teacher of their own: they share the engine of a model."""


class Steps:
    """An engine, the setting of a row, and the batches made for the next step."""

    def __init__(self, row: Row, plan: Plan, device: torch.device) -> None:
        """Build the engine of the row's model; `set` gives it the row's setting."""
        init_distributed(device="cuda" if device.type == "cuda" else "cpu")
        self.plan, self.device = plan, device
        self.space = token_space(plan.vocabulary)
        self.config = row_config(replace(row, micro_batch=1, accumulate=1, compile=False), plan)
        self.objective = self._build_objective()
        self.topology = Topology.build(
            **self.config.parallel.degrees, precision=self.config.train.precision
        )
        # Weights drawn by name take minutes on the host at 1.7B; here only their scale matters.
        with mock.patch.object(
            build, "initialize", lambda model, seed: mark_parallel_layers(model)
        ):
            self.module = build.build_model(self.config, self.topology, self.objective)
        fill(self.module.to(device))
        self.engine = build_engine(
            self.module,
            parameter_groups(self.module, self.config.optimizer),
            build.engine_config(self.config, self.topology),
            self.topology,
        )
        build.add_teacher(self.config, self.engine, self.module, device)
        self.serving = engine_key(self.config)
        self._compiled_for: Row | None = None

    def serves(self, row: Row) -> bool:
        """True where the row has the parameters of this engine."""
        return engine_key(row_config(row, self.plan)) == self.serving

    def set(self, row: Row) -> None:
        """Take over the setting of a row; batches made for another one are dropped."""
        self.row, self.config = row, row_config(row, self.plan)
        self.objective = self._build_objective()
        self.module.objective = self.objective
        self.module.compile_loss = row.compile_loss
        self._set_layers(row)
        self.engine.config = build.engine_config(self.config, self.topology)
        # DeepSpeed was given a micro-batch of 1, so that its batch is the number of forward passes.
        self.engine.deepspeed.set_train_batch_size(row.accumulate)
        self.engine.deepspeed.micro_steps = 0  # an update where they are a multiple of that number
        self.position = torch.arange(row.micro_batch)
        self.evaluated = self.positions = 0
        self.corruption: deque[float] = deque(maxlen=16)
        self.ready: list[TrainBatch] = []

    def _set_layers(self, row: Row) -> None:
        """Recompute setting and compilation of the layers."""
        shape = replace(row, accumulate=1, profile=False)
        if shape != self._compiled_for:  # each shape would count against the compiler's limit
            torch._dynamo.reset()
        self._compiled_for = shape
        transformer = self.module.model
        transformer.recompute = Recompute(self.config.train.recompute)
        for layer in transformer.layers:
            layer.keep.active = row.recompute == "selective"
            layer._compiled_call_impl = None
        if row.compile:
            transformer.compile_layers()

    def _build_objective(self) -> Objective:
        static = self.device.type == "cuda"
        return build_objective(self.config.objective, self.space, static_rows=static)

    def step(self) -> StepResult:
        """One optimizer step; prepares the batches of the next one."""
        while len(self.ready) < self.row.accumulate:
            self.ready.append(self._batch())
        batches, self.ready = self.ready, []
        result = self.engine.step(batches, self.tokens, LR, self._prepare)
        assert self.engine.deepspeed.micro_steps % self.row.accumulate == 0, "no update at the end"
        return result

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.row.micro_batch * self.plan.length * self.row.accumulate

    def _prepare(self) -> None:
        if len(self.ready) < self.row.accumulate:
            self.ready.append(self._batch())

    def _batch(self) -> TrainBatch:
        """The next corrupted micro-batch, on the device."""
        tokens = random_tokens(self.space, self.row.micro_batch, self.plan.length)
        start = time.perf_counter()
        clean = clean_batch(tokens, self.position)
        batch = self.objective.corrupt(clean, NoiseKey(0, self.position))
        self.corruption.append(time.perf_counter() - start)
        self.position = self.position + self.row.micro_batch
        self.evaluated += int((batch.weight != 0).sum())
        self.positions += tokens.numel()
        return batch.to(self.device)

    def measure(self) -> dict[str, Any]:
        """Median of the steps after two that warm up, and what follows from it."""
        begin = time.monotonic()
        first = self.step()
        self.step()
        synchronise(self.device)
        warm_up = time.monotonic() - begin
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        marks = [time.perf_counter()]
        for _ in range(self.plan.steps):
            last = self.step()
            synchronise(self.device)
            marks.append(time.perf_counter())
        seconds = statistics.median(b - a for a, b in itertools.pairwise(marks))
        flops = counted_flops(
            self.config.model,
            self.space.padded_vocab_size,
            self.plan.length,
            self.objective,
            self.evaluated / self.positions,
        )
        return {
            "seconds": seconds,
            "tokens_per_second": self.tokens / seconds,
            "tflops": self.tokens * flops / seconds / 1e12,
            "warm_up_seconds": warm_up,
            "corruption_seconds": statistics.median(self.corruption),
            "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0,
            "reserved_gib": torch.cuda.max_memory_reserved() / 2**30 if cuda else 0.0,
            "loss_first": float(first.loss),
            "loss_last": float(last.loss),
            "grad_norm": float(last.grad_norm),
        }


def row_config(row: Row, plan: Plan) -> Config:
    """The configuration that `epochal train` would have for a row."""
    return configuration(
        f"model={row.model}",
        f"objective={row.objective}",
        f"objective.time_window={row.micro_batch}",
        f"data.seq_length={plan.length}",
        f"train.global_batch_size={row.micro_batch * row.accumulate}",
        f"train.micro_batch_size={row.micro_batch}",
        f"train.recompute={row.recompute}",
        f"train.compile={str(row.compile).lower()}",
        f"train.compile_loss={str(row.compile_loss).lower()}",
        "train.precision=bfloat16",
        "parallel.zero_stage=1",
    )


def engine_key(config: Config) -> tuple[ModelConfig, str | None]:
    """Two configurations with the same key have the same parameters."""
    name = config.objective.name
    return config.model, None if name in WITHOUT_PARAMETERS else name


@torch.no_grad()
def fill(module: torch.nn.Module) -> None:
    """Weights of the usual scale, drawn where they lie."""
    for name, parameter in module.named_parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=0.02)
        else:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)


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
        extra_passes=objective.extra_passes,
    )


def release(device: torch.device) -> None:
    """Drop groups, compiled code and cached memory of an engine that nobody holds any longer."""
    shutdown()
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
