"""Settings of DeepSpeed that would cost correctness without an error if they were wrong."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from parallel.engine.optimizer import OptimizerSpec
from parallel.engine.settings import EngineConfig, deepspeed_config
from parallel.layout.rules import Layout
from parallel.layout.topology import Topology

NOTHING = OptimizerSpec("nothing", (), torch.optim.SGD)
LARGEST = 80_000_000
"""Elements: an embedding that exceeds the default bucket."""


def zero_settings(zero_stage: int, pp: int = 1, dp: int = 4, **changes: Any) -> dict[str, Any]:
    """DeepSpeed's settings of ZeRO."""
    layout = Layout(pipeline_parallel_size=pp, data_parallel_size=dp)
    topology = cast(Topology, SimpleNamespace(dp_cp_size=dp, layout=layout))
    config = EngineConfig(zero_stage, "float32", 1, 1, NOTHING, **changes)
    zero: dict[str, Any] = deepspeed_config(config, topology, LARGEST)["zero_optimization"]
    return zero


@pytest.mark.parametrize(("zero_stage", "beside"), [(0, False), (1, False), (2, False), (3, True)])
def test_gradients_are_reduced_during_the_backward_pass_at_stage_3_only(
    zero_stage: int, beside: bool
) -> None:
    zero = zero_settings(zero_stage)
    assert zero["overlap_comm"] is beside
    assert zero["reduce_bucket_size"] == EngineConfig.reduce_bucket_size


@pytest.mark.parametrize("zero_stage", [1, 2])
def test_no_gradient_exceeds_a_bucket_that_is_reduced_during_the_backward_pass(
    zero_stage: int,
) -> None:
    zero = zero_settings(zero_stage, overlap_comm=True)
    assert zero["overlap_comm"] is True
    assert zero["reduce_bucket_size"] == LARGEST
    wide = zero_settings(zero_stage, overlap_comm=True, reduce_bucket_size=2 * LARGEST)
    assert wide["reduce_bucket_size"] == 2 * LARGEST


def test_overlap_can_be_turned_off_at_stage_3_and_is_off_on_a_single_rank() -> None:
    assert zero_settings(3, overlap_comm=False)["overlap_comm"] is False
    assert zero_settings(2, dp=1, overlap_comm=True)["overlap_comm"] is False  # runs as stage 0


def test_overlap_is_off_in_a_pipeline() -> None:
    assert zero_settings(1, pp=2)["overlap_comm"] is False
