"""Engine of a layout: DeepSpeed's pipeline where there are stages, one stage elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from parallel.engine.base import Engine
from parallel.engine.optimizer import check_optimizer
from parallel.engine.settings import EngineConfig
from parallel.layout.rules import check_rules
from parallel.layout.topology import Topology


def build_engine(
    module: nn.Module,
    param_groups: Sequence[dict[str, Any]],
    config: EngineConfig,
    topology: Topology,
) -> Engine:
    """Engine that hosts `module` in this layout; moves it to the rank's device.

    `param_groups` are dicts with `params`, `weight_decay` and optionally `lr_scale`; together they
    hold every trainable parameter once. Raises LayoutError for a ZeRO stage, precision or optimizer
    that is illegal in this layout.
    """
    check_rules(
        topology.layout, config.zero_stage, config.precision, config.offload, config.overlap_comm
    )
    check_optimizer(
        config.optimizer, topology.layout, config.zero_stage, config.precision, config.offload
    )
    given = [id(p) for group in param_groups for p in group["params"]]
    trainable = {id(p) for p in module.parameters() if p.requires_grad}
    assert sorted(given) == sorted(trainable), (
        "param_groups must hold every trainable parameter of the module exactly once"
    )
    if topology.pipeline_parallel_size > 1:
        from parallel.engine.pipeline import PipelineEngine as Host
    else:
        from parallel.engine.single_stage import (  # type: ignore[assignment]
            SingleStageEngine as Host,
        )
    engine = Host(module, param_groups, config, topology)
    engine._begin()
    return engine
