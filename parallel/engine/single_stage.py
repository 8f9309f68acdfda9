"""Host of every layout without a pipeline: DeepSpeed's engine with ZeRO 0-3.

ZeRO 1-3 leave gradient norm and clipping to DeepSpeed; at stage 0 in float32 DeepSpeed reports no
norm and clips wrongly under tensor parallelism, so both are computed here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel.engine.base import Engine, StepResult
from parallel.engine.norm import clip_divisor, global_grad_norm
from parallel.engine.settings import EngineConfig, deepspeed_config, stage_of
from parallel.layout.topology import Topology


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
            config=deepspeed_config(config, topology, self._largest),
            mpu=topology.mpu,
        )
        self._own_norm = stage_of(config, topology) == 0
        # Stage 0 reduces once per step, and not at all on one rank (DeepSpeed would flatten and
        # copy every gradient).
        self.deepspeed.enable_backward_allreduce = not self._own_norm
        self._trainable = [p for p in self.parameters.values() if p.requires_grad]

    def _step(
        self, batches: Sequence[Any], denominator: int, prefetch_next: Callable[[], object]
    ) -> StepResult:
        """See `Engine.step`."""
        # DeepSpeed averages gradients over data-parallel ranks; the factor undoes that.
        scale = self.topology.dp_cp_size / denominator
        losses, norm, finite = [], None, None
        for index, batch in enumerate(batches):
            loss_sum = self.deepspeed(batch)
            prefetch_next()  # not after the backward pass: some ZeRO stages wait for the device
            self.deepspeed.backward(loss_sum * scale, scale_wrt_gas=False)
            losses.append(loss_sum.detach().float())
            if self._own_norm and index == len(batches) - 1:
                norm, finite = self._reduce_and_clip()
            self.deepspeed.step()
        total = torch.stack(losses).sum()
        if self.topology.dp_cp_size > 1:
            dist.all_reduce(total, group=self.topology.dp_cp_group)
        if norm is None:
            applied = self.deepspeed.was_step_applied()
            norm = self._reported_norm(total.device)
        else:
            applied = bool(finite)  # the host waits for the device here, when all is enqueued
        return StepResult(total / denominator, norm, self._count(applied))

    def evaluate(self, batch: Any) -> Tensor:
        """See `Engine.evaluate`."""
        was_training = self.module.training
        self.module.eval()
        with torch.no_grad():
            bound: Tensor = self.module(batch, exact=True)
        self.module.train(was_training)
        return bound

    def _reduce_and_clip(self) -> tuple[Tensor, Tensor]:
        """Stage 0: average gradients over ranks and measure them; the norm, and if it is finite.

        torch's fused kernels do the rest where they read the gradient anyway: they divide by
        `grad_scale`, and leave weights and state as they are where `found_inf` is 1. Elsewhere the
        gradient is divided here, or taken away, which leaves the optimizer nothing to do.
        """
        for p in self._trainable:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        if self.topology.dp_cp_size > 1:
            self.deepspeed.allreduce_gradients()
        norm = global_grad_norm(self._trainable, self.topology)
        finite = norm.isfinite()
        largest = self.config.clip_grad_norm
        divisor = clip_divisor(norm, largest) if largest > 0 else None
        optimizer: Any = self.optimizer
        if getattr(optimizer, "_step_supports_amp_scaling", False):  # as torch's GradScaler asks
            optimizer.grad_scale = divisor
            optimizer.found_inf = (~finite).float()
        elif not finite:  # the host waits for the device here
            for p in self._trainable:
                p.grad = None
        elif divisor is not None:
            gradients = [p.grad for p in self._trainable if p.grad is not None]
            torch._foreach_div_(gradients, divisor)
        return norm, finite
