"""A model, a machine and optimizers with round numbers, on which the planner's tests agree."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from parallel.engine.optimizer import OptimizerSpec, StateTensor
from parallel.layout.rules import Layout
from parallel.planner.candidate import Candidate
from parallel.planner.costs import Loss, ModelCost, Part, Saved, Weight
from parallel.planner.machine import Machine

MACHINE = Machine(
    name="test", num_nodes=2, gpus_per_node=8, memory_gib=80, bfloat16_tflops=1000,
    float32_tflops=60, memory_bandwidth_gbs=3000, nvlink_gbs=400, network_gbs=400,
)  # fmt: skip
HIDDEN, LAYERS, LENGTH = 1024, 8, 512


def never_built(groups: object) -> Any:
    raise AssertionError("the planner makes no optimizer")


ADAMW = OptimizerSpec("adamw", (StateTensor("exp_avg"), StateTensor("exp_avg_sq")), never_built)
WHOLE = replace(ADAMW, name="whole", elementwise=False)


def model(**changes: object) -> ModelCost:
    """Layers of one matrix and one norm; embedding and head cost nothing."""
    layer = Part(
        weights=(Weight(4 * HIDDEN**2, True), Weight(HIDDEN, False, 1)),
        saved=(Saved(HIDDEN, "sequence"), Saved(4 * HIDDEN, "tensor")),
        kept={"full": (Saved(HIDDEN, "sequence"),)},
        matrix_flops=8.0 * HIDDEN**2,
    )
    cost = ModelCost(
        first=Part(weights=(Weight(64 * HIDDEN, True),)),
        layer=layer,
        num_layers=LAYERS,
        last=Part(weights=(Weight(HIDDEN, False, 1),)),
        final=(),
        layer_workspace=(),
        loss=Loss(0, HIDDEN, 0, 0, 0),
        tied=(Weight(64 * HIDDEN, True),),
        hidden_size=HIDDEN,
        key_value_size=2 * HIDDEN,
        seq_length=LENGTH,
        positions_per_token=1.0,
        head_share=1.0,
        flops_per_token=3 * LAYERS * 8.0 * HIDDEN**2,
        stage_costs=((1.0,) * LAYERS, 0.0),
        tensor_parallel_sizes={"heads": 16},
        key_value_heads=16,
        extra_passes=0.0,
        pipeline=True,
        context=True,
        sequence=True,
        largest_zero_stage=3,
        teacher=False,
        vocabulary_elements=64 * HIDDEN,
    )
    return replace(cost, **changes)  # type: ignore[arg-type]


def candidate(layout: Layout, **changes: object) -> Candidate:
    return replace(Candidate(layout, 1, 2, 16, ADAMW), **changes)  # type: ignore[arg-type]
