"""Layout of a run: every degree of parallelism, every rank and every group, in one class.

`Topology.build` refuses illegal layouts (`parallel.layout.rules`) and then creates the groups with
megatron-core, whose rank order (tensor, context, data, pipeline; tensor ranks adjacent) DeepSpeed's
pipeline grid shares.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from parallel.layout.rules import Layout, check_layout
from parallel.layout.stages import Stage, split_layers

__all__ = ["Layout", "Topology", "check_layout"]


@dataclass(frozen=True)
class Topology:
    """This rank's place in the layout, and its process groups."""

    layout: Layout
    rank: int
    world_size: int
    tp_rank: int
    pp_rank: int
    cp_rank: int
    dp_rank: int
    dp_cp_rank: int
    tp_group: Any
    pp_group: Any
    cp_group: Any
    dp_group: Any
    """Ranks with the same weights that read different sequences; context ranks are not in it."""
    dp_cp_group: Any
    """Ranks over which gradients of the same weights are summed: data x context."""

    @classmethod
    def build(
        cls,
        *,
        tensor_parallel_size: int = 1,
        pipeline_parallel_size: int = 1,
        context_parallel_size: int = 1,
        data_parallel_size: int | None = None,
        sequence_parallel: bool = False,
        zero_stage: int = 0,
        precision: str = "float32",
        timeout_minutes: float = 30.0,
    ) -> Topology:
        """Check the layout and create its groups; needs `runtime.init_distributed` before.

        Building again replaces the former groups. Raises LayoutError before any group exists.
        """
        import torch.distributed as dist

        layout = check_layout(
            world_size=dist.get_world_size(),
            tensor_parallel_size=tensor_parallel_size,
            pipeline_parallel_size=pipeline_parallel_size,
            context_parallel_size=context_parallel_size,
            data_parallel_size=data_parallel_size,
            sequence_parallel=sequence_parallel,
            zero_stage=zero_stage,
            precision=precision,
        )
        from megatron.core import parallel_state as state

        if state.model_parallel_is_initialized():
            state.destroy_model_parallel()
        state.initialize_model_parallel(
            tensor_model_parallel_size=layout.tensor_parallel_size,
            pipeline_model_parallel_size=layout.pipeline_parallel_size,
            context_parallel_size=layout.context_parallel_size,
            distributed_timeout_minutes=max(1, round(timeout_minutes)),
            # megatron-core's checkpoints would need second groups on gloo. Ours do not, and each
            # group costs every rank threads and sockets.
            create_gloo_process_groups=False,
        )
        return cls(
            layout=layout,
            rank=dist.get_rank(),
            world_size=layout.world_size,
            tp_rank=state.get_tensor_model_parallel_rank(),
            pp_rank=state.get_pipeline_model_parallel_rank(),
            cp_rank=state.get_context_parallel_rank(),
            dp_rank=state.get_data_parallel_rank(),
            dp_cp_rank=state.get_data_parallel_rank(with_context_parallel=True),
            tp_group=state.get_tensor_model_parallel_group(),
            pp_group=state.get_pipeline_model_parallel_group(),
            cp_group=state.get_context_parallel_group(),
            dp_group=state.get_data_parallel_group(),
            dp_cp_group=state.get_data_parallel_group(with_context_parallel=True),
        )

    @property
    def tensor_parallel_size(self) -> int:
        """Ranks that share every matrix."""
        return self.layout.tensor_parallel_size

    @property
    def pipeline_parallel_size(self) -> int:
        """Stages that share the layers."""
        return self.layout.pipeline_parallel_size

    @property
    def context_parallel_size(self) -> int:
        """Ranks that share every sequence."""
        return self.layout.context_parallel_size

    @property
    def data_parallel_size(self) -> int:
        """Ranks that share the global batch."""
        return self.layout.data_parallel_size

    @property
    def dp_cp_size(self) -> int:
        """Ranks over which gradients of the same weights are summed."""
        return self.data_parallel_size * self.context_parallel_size

    @property
    def sequence_parallel(self) -> bool:
        """True where activations between matrices are sharded over the tensor-parallel ranks."""
        return self.layout.sequence_parallel

    @property
    def is_first_stage(self) -> bool:
        """True where this rank embeds the tokens."""
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """True where this rank computes the loss."""
        return self.pp_rank == self.pipeline_parallel_size - 1

    def stage(
        self, layer_costs: Sequence[float], first_cost: float = 0.0, last_cost: float = 0.0
    ) -> Stage:
        """Part of the model that this rank holds, stages balanced by cost (`split_layers`)."""
        stages = split_layers(layer_costs, self.pipeline_parallel_size, first_cost, last_cost)
        return Stage(self.is_first_stage, self.is_last_stage, stages[self.pp_rank])

    @property
    def mpu(self) -> ModelParallelUnit:
        """Ranks and groups under the names that DeepSpeed asks for."""
        return ModelParallelUnit(self)


class ModelParallelUnit:
    """The names under which DeepSpeed looks up tensor- and data-parallel ranks and groups."""

    def __init__(self, topology: Topology) -> None:
        t = topology

        def constant(value: Any) -> Any:
            return lambda: value

        for prefix in ("model_parallel", "tensor_model_parallel"):
            setattr(self, f"get_{prefix}_rank", constant(t.tp_rank))
            setattr(self, f"get_{prefix}_world_size", constant(t.tensor_parallel_size))
            setattr(self, f"get_{prefix}_group", constant(t.tp_group))
        # Context ranks hold the same weights: to DeepSpeed they are data-parallel ranks.
        self.get_data_parallel_rank = constant(t.dp_cp_rank)
        self.get_data_parallel_world_size = constant(t.dp_cp_size)
        self.get_data_parallel_group = constant(t.dp_cp_group)
        self.get_pipeline_model_parallel_rank = constant(t.pp_rank)
        self.get_pipeline_model_parallel_world_size = constant(t.pipeline_parallel_size)
        self.get_pipeline_model_parallel_group = constant(t.pp_group)
