"""Every shard of large models on the meta device, as ranks of a process group that is not there."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch.testing._internal.distributed.fake_pg import FakeStore

from parallel.layers import mark_parallel_layers, partition_dim
from parallel.layout.rules import Layout
from parallel.layout.topology import Topology
from pretrain.config.run import ModelConfig
from pretrain.model.size import stage_costs
from pretrain.model.transformer import Transformer
from pretrain.vocabulary import TokenSpace

Shapes = dict[str, tuple[tuple[int, ...], int | None]]
"""Shape of each parameter, and the dimension along which it is a slice."""


@contextmanager
def rank_of(layout: Layout, rank: int) -> Iterator[Topology]:
    """The topology that `rank` of the layout would see; collectives do nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=layout.world_size)
    initialize = parallel_state.initialize_model_parallel
    # megatron would make a second set of groups on gloo, which is not fake.
    parallel_state.initialize_model_parallel = functools.partial(
        initialize, create_gloo_process_groups=False
    )
    try:
        yield Topology.build(
            tensor_parallel_size=layout.tensor_parallel_size,
            pipeline_parallel_size=layout.pipeline_parallel_size,
            sequence_parallel=layout.sequence_parallel,
            zero_stage=1,
            precision="bfloat16",
        )
    finally:
        parallel_state.initialize_model_parallel = initialize
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def shapes_of(topology: Topology, model: ModelConfig, space: TokenSpace) -> Shapes:
    """The parameters that this rank would hold."""
    layers, head = stage_costs(model, space.padded_vocab_size, 1.0)
    stage = topology.stage(layers, last_cost=head)
    with torch.device("meta"):
        module = Transformer(model, space, topology, stage)
    mark_parallel_layers(module)
    return {name: (tuple(p.shape), partition_dim(p)) for name, p in module.named_parameters()}


def shards(layout: Layout, model: dict[str, Any], vocabulary: int) -> dict[str, Any]:
    """Shapes of the first and last tensor rank of every stage, and whether the last data rank's are
    alike."""
    config, space = _model(model, vocabulary)
    tp, dp = layout.tensor_parallel_size, layout.data_parallel_size
    found: dict[tuple[int, int], Shapes] = {}
    for pp_rank in range(layout.pipeline_parallel_size):
        for tp_rank in sorted({0, tp - 1}):
            place, shapes = _rank(layout, tp_rank + tp * dp * pp_rank, config, space)
            assert place == (pp_rank, tp_rank)
            found[place] = shapes
    place, shapes = _rank(layout, layout.world_size - 1, config, space)
    return {"found": found, "alike": shapes == found[place]}


def every_rank(
    layout: Layout, model: dict[str, Any], vocabulary: int
) -> list[tuple[tuple[int, int], Shapes]]:
    """(pipeline, tensor) coordinate and shapes of every single rank."""
    config, space = _model(model, vocabulary)
    return [_rank(layout, rank, config, space) for rank in range(layout.world_size)]


def _model(model: dict[str, Any], vocabulary: int) -> tuple[ModelConfig, TokenSpace]:
    config = ModelConfig(**model)
    padded = config.padded_vocab_size(vocabulary)
    return config, TokenSpace(vocabulary, padded, 0, 1, 2, (0, 1, 3))


def _rank(
    layout: Layout, rank: int, config: ModelConfig, space: TokenSpace
) -> tuple[tuple[int, int], Shapes]:
    with rank_of(layout, rank) as topology:
        place = topology.pp_rank, topology.tp_rank
        return place, shapes_of(topology, config, space)


def elements(shapes: Shapes) -> int:
    """Parameters of one rank."""
    return sum(math.prod(shape) for shape, _ in shapes.values())
