"""The host of every layout without a pipeline: DeepSpeed's engine with ZeRO 0-3.

ZeRO 1-3 leave gradient norm and clipping to DeepSpeed; at stage 0 in float32 DeepSpeed reports no
norm and clips wrongly under tensor parallelism, so both are computed here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel.engine import Engine, StepResult
from parallel.norm import clip_coefficient, global_grad_norm
from parallel.settings import EngineConfig, deepspeed_config, effective_stage
from parallel.topology import Topology


class SingleStageEngine(Engine):
    """Forward and backward per micro-batch, then one update."""

    def __init__(
        self,
        module: nn.Module,
        param_groups: Sequence[dict[str, Any]],
        config: EngineConfig,
        topology: Topology,
    ) -> None:
        import deepspeed

        super().__init__(module, param_groups, config, topology)
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
        self._trainable = [p for p in self.parameters.values() if p.requires_grad]

    def step(self, batches: Sequence[Any], denominator: int, lr: float) -> StepResult:
        """See `Engine.step`."""
        assert len(batches) == self.config.num_microbatches, "one batch per micro-batch"
        self._set_lr(lr)
        # DeepSpeed averages gradients over data-parallel ranks; the factor undoes that.
        scale = self.topology.dp_cp_size / denominator
        losses, applied, norm = [], True, None
        for index, batch in enumerate(batches):
            loss_sum = self.deepspeed(batch)
            self.deepspeed.backward(loss_sum * scale, scale_wrt_gas=False)
            losses.append(loss_sum.detach().float())
            if self._own_norm and index == len(batches) - 1:
                norm, applied = self._reduce_and_clip()
            self.deepspeed.step()
        total = torch.stack(losses).sum()
        if self.topology.dp_cp_size > 1:
            dist.all_reduce(total, group=self.topology.dp_cp_group)
        if norm is None:
            applied = self.deepspeed.was_step_applied()
            norm = self._reported_norm(total.device)
        return StepResult(total / denominator, norm, self._count(applied))

    def evaluate(self, batch: Any) -> Tensor:
        """See `Engine.evaluate`."""
        was_training = self.module.training
        self.module.eval()
        with torch.no_grad():
            bound: Tensor = self.module(batch, exact=True)
        self.module.train(was_training)
        return bound

    def _reduce_and_clip(self) -> tuple[Tensor, bool]:
        """Stage 0: average gradients over ranks, measure and clip them; False if not finite."""
        for p in self._trainable:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        if self.topology.dp_cp_size > 1:
            self.deepspeed.allreduce_gradients()
        norm = global_grad_norm(self._trainable, self.topology)
        if not math.isfinite(norm.item()):
            # AdamW skips parameters without a gradient: weights, moments and step stay as they are.
            for p in self._trainable:
                p.grad = None
            return norm, False
        if self.config.clip_grad_norm > 0:
            coefficient = clip_coefficient(norm, self.config.clip_grad_norm)
            torch._foreach_mul_(
                [p.grad for p in self._trainable if p.grad is not None], coefficient
            )
        return norm, True
