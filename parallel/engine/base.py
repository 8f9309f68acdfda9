"""Training engine as the train loop sees it: one small interface, two hosts behind it.

Losses are sums of weighted token losses; the engine divides by the number of valid tokens of the
global batch, so that neither ranks nor micro-batches change a gradient. `SingleStageEngine` hosts
every layout without a pipeline, `PipelineEngine` the others; both are DeepSpeed underneath.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from parallel.engine import fragments
from parallel.engine.average import WeightAverage
from parallel.engine.optimizer import EMA, TEACHER, WEIGHT, Kind
from parallel.engine.settings import EngineConfig, build_optimizer
from parallel.layers import mark_parallel_layers, whole_shape
from parallel.layout.topology import Topology

__all__ = ["Engine", "EngineConfig", "StepResult"]


@dataclass(frozen=True)
class StepResult:
    """Measurements of a step; tensors are equal on all ranks and stay on the device."""

    loss: Tensor
    """0-d float32: sum of the weighted token losses of the global batch / denominator."""
    grad_norm: Tensor
    """0-d float32: norm of the global gradient before clipping; inf or nan when it overflowed."""
    applied: bool
    """False when the gradient was not finite: weights and optimizer state are then untouched."""


class Engine(ABC):
    """`step` and `evaluate`, and every weight and state of the optimizer by its canonical name.

    `module(batch)` returns the 0-d sum of weighted token losses of this rank's micro-batch;
    `module(batch, exact=True)` returns float64 [b], the bound summed over each sequence. In a
    pipeline the module holds the layers of its stage only: see `parallel.engine.pipeline`.
    """

    deepspeed: Any
    """The DeepSpeed engine."""
    parameters: dict[str, nn.Parameter]
    """The parameters that this rank holds (a slice of), by canonical name; a tied one once."""
    shapes: dict[str, list[int]]
    """Whole shape of every parameter of the model, on every rank alike."""
    average: WeightAverage | None = None
    """The averaged weights, where the configuration asks for them."""
    teacher: Mapping[str, nn.Parameter] | None = None
    """Frozen copy of the model that belongs into checkpoints, sharded as `parameters` is and under
    the same names; set it before anything is saved or loaded."""

    def __init__(
        self,
        module: nn.Module,
        param_groups: Sequence[dict[str, Any]],
        config: EngineConfig,
        topology: Topology,
    ) -> None:
        self.module = module
        self.config = config
        self.topology = topology
        mark_parallel_layers(module)
        self._updates = 0  # as `optimizer_step`, without asking the device
        self._state_checked = False
        self.parameters = dict(module.named_parameters())
        self._largest = max(parameter.numel() for parameter in self.parameters.values())
        self.shapes = {
            name: whole_shape(p, topology.tensor_parallel_size)
            for name, p in self.parameters.items()
        }
        names = {parameter: name for name, parameter in self.parameters.items()}
        self.optimizer = build_optimizer(
            config.optimizer,
            param_groups,
            lambda p: config.optimizer.group_of(names[p], self.shapes[names[p]]),
            topology.pp_group if topology.pipeline_parallel_size > 1 else None,
        )

    def step(
        self,
        batches: Sequence[Any],
        denominator: int,
        lr: float,
        prefetch_next: Callable[[], object] = lambda: None,
    ) -> StepResult:
        """One optimizer step over this rank's micro-batches.

        `denominator` is the number of valid token positions of the global batch, known before the
        forward pass; `lr` is multiplied by each group's `lr_scale`. `prefetch_next` is called after
        each forward pass: the device then has work, and nothing has waited for it yet.
        """
        assert len(batches) == self.config.num_microbatches, "one batch per micro-batch"
        self._set_lr(lr)
        return self._step(batches, denominator, prefetch_next)

    @abstractmethod
    def _step(
        self, batches: Sequence[Any], denominator: int, prefetch_next: Callable[[], object]
    ) -> StepResult:
        """`step` with the learning rate set."""

    @abstractmethod
    def evaluate(self, batch: Any) -> Tensor:
        """Exact bound of each sequence of this rank's `batch`, float64 [b]; no gradients."""

    def read(self, name: str, kind: Kind) -> Tensor:
        """Whole float32 tensor of this kind of a parameter; a collective of all ranks."""
        parameter, kind = self._stored(name, kind)
        return fragments.read_full(parameter, kind, self.optimizer, self.topology)

    def write(self, name: str, kind: Kind, part: Tensor) -> None:
        """Set this tensor-parallel rank's slice of a tensor, on every rank alike."""
        parameter, kind = self._stored(name, kind)
        fragments.write_slice(parameter, kind, part, self.optimizer)

    def _stored(self, name: str, kind: Kind) -> tuple[nn.Parameter, Kind]:
        """Parameter that holds a tensor, and the kind under which it does."""
        if kind != TEACHER:
            return self.parameters[name], kind
        assert self.teacher is not None, "there is no teacher"
        return self.teacher[name], WEIGHT

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """Kinds of tensors that there are of some parameters now, besides their weights."""
        return self._with_copies(self.config.optimizer.names if self.optimizer_step else ())

    def kinds_of(self, name: str) -> tuple[Kind, ...]:
        """Kinds of tensors that there are of this parameter now, besides its weight."""
        group = self.config.optimizer.group(name, self.shapes[name])
        return self._with_copies(group.names if self._updates else ())

    def _with_copies(self, state: tuple[Kind, ...]) -> tuple[Kind, ...]:
        averages = () if self.average is None else (EMA,)
        return (*state, *averages, *(() if self.teacher is None else (TEACHER,)))

    def using_ema(self) -> AbstractContextManager[None]:
        """Context in which forward passes use the averaged weights; without any, no change."""
        return nullcontext() if self.average is None else self.average.in_forward_passes()

    @property
    def optimizer_step(self) -> int:
        """Number of updates that the optimizer has applied; at 0 it holds no state yet."""
        spec = self.config.optimizer
        counted = fragments.counted_updates(self._updated_tensors(), self.optimizer, spec)
        assert counted <= {self._updates}, f"{self._updates} updates, the optimizer has {counted}"
        return self._updates

    @optimizer_step.setter
    def optimizer_step(self, step: int) -> None:
        spec, averaged = self.config.optimizer, self.average is not None
        fragments.create_state(self.parameters.values(), self.optimizer, spec, step, averaged)
        self._updates = step

    def _begin(self) -> None:
        """Begin averaging at the present weights; the last act of building an engine."""
        inner = getattr(self.deepspeed.optimizer, "optimizer", self.deepspeed.optimizer)
        # It does so with classes derived from torch.optim.Adagrad, and drops their groups.
        assert inner is self.optimizer, f"DeepSpeed has replaced {type(self.optimizer).__name__}"
        decay, warmup = self.config.ema_decay, self.config.ema_warmup
        if decay > 0:
            self.average = WeightAverage(self.parameters, self.optimizer, decay, warmup)
            self.optimizer_step = 0

    def _count(self, applied: bool) -> bool:
        """Count an applied update and average it in; returns `applied`.

        Raises OptimizerError after the first update that leaves another state than is declared.
        """
        if applied:
            self._updates += 1
            if not self._state_checked:
                spec = self.config.optimizer
                fragments.check_state(self._updated_tensors(), self.optimizer, spec)
                self._state_checked = True
            if self.average is not None:
                self.average.update(self._updates)
        return applied

    def _updated_tensors(self) -> list[fragments.Updated]:
        """The tensors that the optimizer updates on this rank."""
        return fragments.updated_tensors(self.parameters.values(), self.optimizer)

    def _set_lr(self, lr: float) -> None:
        assert self.average is None or not self.average.in_use, "no step inside using_ema"
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]

    def _reported_norm(self, device: torch.device) -> Tensor:
        """DeepSpeed's norm of the last step."""
        norm = self.deepspeed.get_global_grad_norm()
        return torch.as_tensor(norm, dtype=torch.float32, device=device)
