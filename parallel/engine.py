"""The training engine: one small interface in front of DeepSpeed.

Losses are sums of weighted token losses; the engine divides by the number of valid tokens of the
global batch, so that neither ranks nor micro-batches change a gradient. ZeRO 1-3 leave gradient
norm and clipping to DeepSpeed; at stage 0 in float32 DeepSpeed reports no norm and clips wrongly
under tensor parallelism, so both are computed here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel import fragments
from parallel.errors import LayoutError
from parallel.fragments import Kind
from parallel.layers import mark_parallel_layers, whole_shape
from parallel.norm import clip_coefficient, global_grad_norm
from parallel.topology import Topology


@dataclass(frozen=True)
class EngineConfig:
    """What the engine needs to know about a step."""

    zero_stage: int
    precision: Literal["float32", "bfloat16"]
    micro_batch_size: int
    """Sequences per rank and forward pass."""
    num_microbatches: int
    """Forward passes per rank and optimizer step."""
    clip_grad_norm: float = 1.0
    """Largest global gradient norm; 0 turns clipping off."""
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    reduce_bucket_size: int = 50_000_000
    """Elements per gradient reduction of ZeRO 2 and 3."""


@dataclass(frozen=True)
class StepResult:
    """What a step measured; tensors are equal on all ranks and stay on the device."""

    loss: Tensor
    """0-d float32: sum of the weighted token losses of the global batch / denominator."""
    grad_norm: Tensor
    """0-d float32: norm of the global gradient before clipping; inf or nan when it overflowed."""
    applied: bool
    """False when the gradient was not finite: weights and moments are then untouched."""


class Engine:
    """DeepSpeed's engine (one pipeline stage, ZeRO 0-3) behind `step` and `evaluate`.

    `module(batch)` returns the 0-d sum of weighted token losses of this rank's micro-batch;
    `module(batch, exact=True)` returns float64 [b], the bound summed over each sequence.
    """

    def __init__(
        self,
        module: nn.Module,
        param_groups: Sequence[dict[str, Any]],
        config: EngineConfig,
        topology: Topology,
    ) -> None:
        import deepspeed

        self.module = module
        self.config = config
        self.topology = topology
        mark_parallel_layers(module)
        self.optimizer = adamw(param_groups, config)
        self.deepspeed, *_ = deepspeed.initialize(
            model=module,
            optimizer=self.optimizer,
            config=deepspeed_config(config, topology),
            mpu=topology.mpu,
        )
        self._own_norm = effective_stage(config, topology) == 0
        # Stage 0 reduces once per step, and not at all on one rank (DeepSpeed would flatten and
        # copy every gradient).
        self.deepspeed.enable_backward_allreduce = not self._own_norm
        self.parameters: dict[str, nn.Parameter] = dict(module.named_parameters())
        """Every parameter by its canonical name; a tied one appears once."""
        self.shapes = {
            name: whole_shape(p, topology.tensor_parallel_size)
            for name, p in self.parameters.items()
        }
        """Whole shape of every parameter of the model, on every rank alike."""
        self._parameters = [p for p in self.parameters.values() if p.requires_grad]
        self._norm = torch.zeros(())

    def step(self, batches: Sequence[Any], denominator: int, lr: float) -> StepResult:
        """One optimizer step over this rank's micro-batches.

        `denominator` is the number of valid token positions of the global batch, known before the
        forward pass; `lr` is multiplied by each group's `lr_scale`.
        """
        assert len(batches) == self.config.num_microbatches, "one batch per micro-batch"
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        # DeepSpeed averages gradients over data-parallel ranks; the factor undoes that.
        scale = self.topology.data_parallel_size / denominator
        total = None
        applied = True
        for index, batch in enumerate(batches):
            loss_sum = self.deepspeed(batch)
            self.deepspeed.backward(loss_sum * scale, scale_wrt_gas=False)
            detached = loss_sum.detach().float()
            total = detached if total is None else total + detached
            if self._own_norm and index == len(batches) - 1:
                applied = self._reduce_and_clip()
            self.deepspeed.step()
        assert total is not None
        if self.topology.data_parallel_size > 1:
            dist.all_reduce(total, group=self.topology.dp_group)
        if not self._own_norm:
            applied = self.deepspeed.was_step_applied()
            self._norm = torch.as_tensor(
                self.deepspeed.get_global_grad_norm(), dtype=torch.float32, device=total.device
            )
        return StepResult(total / denominator, self._norm, applied)

    def evaluate(self, batch: Any) -> Tensor:
        """Exact bound of each sequence of this rank's `batch`, float64 [b]; no gradients."""
        was_training = self.module.training
        self.module.eval()
        with torch.no_grad():
            bound: Tensor = self.module(batch, exact=True)
        self.module.train(was_training)
        return bound

    def read(self, name: str, kind: Kind) -> Tensor:
        """Whole float32 tensor of a parameter or one of its moments; a collective of all ranks."""
        return fragments.read_full(self.parameters[name], kind, self.optimizer, self.topology)

    def write(self, name: str, kind: Kind, own: Tensor) -> None:
        """Set this tensor-parallel rank's slice of a parameter or moment, on every rank alike."""
        fragments.write_slice(self.parameters[name], kind, own, self.optimizer)

    @property
    def optimizer_step(self) -> int:
        """How many updates AdamW has applied; 0 means there are no moments yet."""
        return fragments.optimizer_step(self.optimizer)

    @optimizer_step.setter
    def optimizer_step(self, step: int) -> None:
        fragments.create_moments(self.parameters.values(), self.optimizer, step)

    def _reduce_and_clip(self) -> bool:
        """Stage 0: average gradients over ranks, measure and clip them; False if not finite."""
        for p in self._parameters:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        if self.topology.data_parallel_size > 1:
            self.deepspeed.allreduce_gradients()
        self._norm = global_grad_norm(self._parameters, self.topology)
        if not math.isfinite(self._norm.item()):
            # AdamW skips parameters without a gradient: weights, moments and step stay as they are.
            for p in self._parameters:
                p.grad = None
            return False
        if self.config.clip_grad_norm > 0:
            coefficient = clip_coefficient(self._norm, self.config.clip_grad_norm)
            torch._foreach_mul_(
                [p.grad for p in self._parameters if p.grad is not None], coefficient
            )
        return True


def build_engine(
    module: nn.Module,
    param_groups: Sequence[dict[str, Any]],
    config: EngineConfig,
    topology: Topology,
) -> Engine:
    """The engine that hosts `module` in this layout; moves it to the rank's device.

    `param_groups` are dicts with `params`, `weight_decay` and optionally `lr_scale`; together they
    hold every trainable parameter once. Raises LayoutError for bfloat16 at ZeRO stage 0.
    """
    if config.precision == "bfloat16" and config.zero_stage == 0:
        raise LayoutError(
            "precision bfloat16 needs zero_stage 1 or higher: DeepSpeed's stage 0 takes a wrong "
            "first step in bfloat16. Stage 1 costs nothing on one rank"
        )
    given = [id(p) for group in param_groups for p in group["params"]]
    trainable = {id(p) for p in module.parameters() if p.requires_grad}
    assert sorted(given) == sorted(trainable), (
        "param_groups must hold every trainable parameter of the module exactly once"
    )
    return Engine(module, param_groups, config, topology)


def adamw(param_groups: Sequence[dict[str, Any]], config: EngineConfig) -> torch.optim.AdamW:
    """torch's fused AdamW; DeepSpeed's own would compile an extension first (minutes on CPU)."""
    groups = [{"lr_scale": 1.0, "weight_decay": 0.0, **group} for group in param_groups]
    groups = [group for group in groups if len(group["params"])]
    return torch.optim.AdamW(groups, lr=0.0, betas=config.betas, eps=config.eps, fused=True)


def effective_stage(config: EngineConfig, topology: Topology) -> int:
    """ZeRO stage that DeepSpeed is given.

    On one data-parallel rank there is nothing to shard: stages 1-3 would only keep a second copy of
    float32 weights and copy every gradient.
    """
    alone = topology.data_parallel_size == 1 and topology.pipeline_parallel_size == 1
    return 0 if alone and config.precision == "float32" else config.zero_stage


def deepspeed_config(config: EngineConfig, topology: Topology) -> dict[str, Any]:
    """DeepSpeed's JSON for this step and layout."""
    stage = effective_stage(config, topology)
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": config.micro_batch_size,
        "gradient_accumulation_steps": config.num_microbatches,
        "train_batch_size": config.micro_batch_size
        * config.num_microbatches
        * topology.data_parallel_size,
        "gradient_clipping": config.clip_grad_norm if stage > 0 else 0.0,
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": config.reduce_bucket_size,
            "allgather_bucket_size": config.reduce_bucket_size,
        },
        "zero_allow_untested_optimizer": True,
        "steps_per_print": None,
        # Its timer would synchronise the device twice per forward pass.
        "timers": {"throughput": {"enabled": False}},
    }
    if config.precision == "bfloat16":
        settings["bf16"] = {"enabled": True}
        settings["communication_data_type"] = "fp32"
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    return settings
