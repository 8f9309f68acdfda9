"""Settings of a step, and the one place that turns them into DeepSpeed's and the optimizer's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn

from parallel.engine.optimizer import OptimizerSpec
from parallel.layout.rules import effective_stage, overlaps
from parallel.layout.topology import Topology


@dataclass(frozen=True)
class EngineConfig:
    """Settings of a step."""

    zero_stage: int
    precision: Literal["float32", "bfloat16"]
    micro_batch_size: int
    """Sequences per rank and forward pass."""
    num_microbatches: int
    """Forward passes per rank and optimizer step."""
    optimizer: OptimizerSpec
    clip_grad_norm: float = 1.0
    """Largest global gradient norm; 0 turns clipping off."""
    ema_decay: float = 0.0
    """Decay of the averaged weights; 0 keeps none."""
    ema_warmup: bool = True
    """True: the decay grows as (1 + n) / (10 + n) over the first updates n."""
    offload: Literal["none", "cpu"] = "none"
    """`cpu` keeps optimizer state in host memory, at stage 3 also the weights between their uses.
    """
    reduce_bucket_size: int = 50_000_000
    """Elements per gradient reduction of ZeRO 1 to 3."""
    overlap_comm: bool | None = None
    """True reduces gradients during the backward pass, False after it; None as `overlaps` decides.
    """
    whole_below: int = 100_000
    """ZeRO 3 keeps parameters with fewer elements whole on every rank."""


def build_optimizer(
    spec: OptimizerSpec,
    param_groups: Sequence[dict[str, Any]],
    state_group: Callable[[nn.Parameter], str] = lambda parameter: "",
    stages: Any = None,
) -> torch.optim.Optimizer:
    """Make the declared optimizer over the given groups, each divided by the state groups in it.

    `stages` is the process group of a pipeline, whose stages get the same number of groups.
    """
    groups = []
    for given in param_groups:
        parts: dict[str, list[nn.Parameter]] = {}
        for parameter in given["params"]:
            parts.setdefault(state_group(parameter), []).append(parameter)
        for name, parameters in parts.items():
            group = {"lr_scale": 1.0, "eps_scale": 1.0, "weight_decay": 0.0, **given}
            groups.append({**group, "params": parameters, "state_group": name})
    return spec.build(groups if stages is None else _as_many_as_others(groups, stages))


def _as_many_as_others(groups: list[dict[str, Any]], stages: Any) -> list[dict[str, Any]]:
    """Split groups until every stage of the pipeline has as many; a collective of its stages.

    DeepSpeed sums the norm of one group after the other over all stages. A stage without
    embeddings may have fewer groups, and would leave the others waiting.
    """
    counts = [0] * dist.get_world_size(stages)
    dist.all_gather_object(counts, len(groups), group=stages)
    result = list(groups)
    while len(result) < max(counts):
        largest = max(result, key=lambda group: len(group["params"]))
        half, rest = len(largest["params"]) // 2, largest["params"]
        assert half > 0, "a stage has fewer parameters than another one has groups"
        place = next(i for i, group in enumerate(result) if group is largest)
        result[place : place + 1] = [
            {**largest, "params": rest[:half]},
            {**largest, "params": rest[half:]},
        ]
    return result


def stage_of(config: EngineConfig, topology: Topology) -> int:
    """ZeRO stage that DeepSpeed is given (`parallel.layout.rules.effective_stage`)."""
    return effective_stage(topology.layout, config.zero_stage, config.precision, config.offload)


def bucket_size(config: EngineConfig, stage: int, largest: int) -> int:
    """Elements of a reduction, where `largest` is the number of those of the largest parameter.

    Stages 1 and 2 reduce a gradient that exceeds a bucket in place and free it at once. During the
    backward pass its memory could then be overwritten before the reduction has read it. So no
    gradient may exceed a bucket there.
    """
    overlapping = stage in (1, 2) and overlaps(stage, config.overlap_comm)
    return max(config.reduce_bucket_size, largest if overlapping else 0)


def deepspeed_config(config: EngineConfig, topology: Topology, largest: int) -> dict[str, Any]:
    """DeepSpeed's JSON for this step and layout.

    `largest` is the number of elements of the rank's largest parameter.
    """
    stage = stage_of(config, topology)
    bucket = bucket_size(config, stage, largest)
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": config.micro_batch_size,
        "gradient_accumulation_steps": config.num_microbatches,
        "train_batch_size": config.micro_batch_size * config.num_microbatches * topology.dp_cp_size,
        "gradient_clipping": config.clip_grad_norm if stage > 0 else 0.0,
        "zero_optimization": {
            "stage": stage,
            "overlap_comm": stage > 0 and overlaps(stage, config.overlap_comm),
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
            "stage3_param_persistence_threshold": config.whole_below,
        },
        # Which optimizers are legal is decided by their declaration (`check_optimizer`), not by
        # DeepSpeed's list of types.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
        # The timer would synchronise the device twice per forward pass.
        "timers": {"throughput": {"enabled": False}},
        # The partitioned form of its messages cannot carry a second float tensor (the condition).
        "pipeline": {"pipe_partitioned": False, "grad_partitioned": False},
    }
    if config.precision == "bfloat16":
        settings["bf16"] = {"enabled": True}
        settings["communication_data_type"] = "fp32"
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    if config.offload != "none":
        where = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
        settings["zero_optimization"]["offload_optimizer"] = where
        if stage == 3:
            settings["zero_optimization"]["offload_param"] = where
    return settings
