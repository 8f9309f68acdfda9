"""The layout of a run: every degree of parallelism, every rank and every group, in one class.

`check_layout` is pure arithmetic and refuses illegal layouts before any process group exists;
`Topology.build` then creates the groups with megatron-core, whose rank order (tensor, context,
data, pipeline; tensor ranks adjacent) DeepSpeed's pipeline grid shares.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from parallel.errors import LayoutError
from parallel.stages import Stage, split_layers


@dataclass(frozen=True)
class Layout:
    """Degrees of parallelism; their product is the number of ranks."""

    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    context_parallel_size: int = 1
    data_parallel_size: int = 1
    sequence_parallel: bool = False

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return (
            self.tensor_parallel_size
            * self.pipeline_parallel_size
            * self.context_parallel_size
            * self.data_parallel_size
        )

    def __str__(self) -> str:
        degrees = {
            "tp": self.tensor_parallel_size,
            "pp": self.pipeline_parallel_size,
            "cp": self.context_parallel_size,
            "dp": self.data_parallel_size,
        }
        parts = [f"{axis}{size}" for axis, size in degrees.items() if size > 1]
        if self.sequence_parallel:
            parts.append("sp")
        return " x ".join(parts) or "1 rank"


def check_layout(
    *,
    world_size: int,
    tensor_parallel_size: int = 1,
    pipeline_parallel_size: int = 1,
    context_parallel_size: int = 1,
    data_parallel_size: int | None = None,
    sequence_parallel: bool = False,
    zero_stage: int = 0,
    precision: str = "float32",
    sizes: Mapping[str, int] | None = None,
    num_query_groups: int | None = None,
    num_layers: int | None = None,
    seq_length: int | None = None,
) -> Layout:
    """The legal layout for these degrees, or LayoutError saying what is allowed.

    `data_parallel_size` None takes the ranks that the other degrees leave. `sizes` names model
    dimensions that tensor parallelism cuts (heads, MLP width, padded vocabulary);
    `num_query_groups` is cut by tensor and context parallelism together.
    """
    tp, pp, cp = tensor_parallel_size, pipeline_parallel_size, context_parallel_size
    for name, size in (
        ("world_size", world_size),
        ("tensor_parallel_size", tp),
        ("pipeline_parallel_size", pp),
        ("context_parallel_size", cp),
        ("data_parallel_size", 1 if data_parallel_size is None else data_parallel_size),
    ):
        if size < 1:
            raise LayoutError(f"{name} is {size}; it must be 1 or more")
    model = tp * pp * cp
    if world_size % model:
        raise LayoutError(
            f"tensor {tp} x pipeline {pp} x context {cp} = {model} does not divide the "
            f"{world_size} ranks; start a multiple of {model} ranks or lower a degree"
        )
    dp = world_size // model
    if data_parallel_size is not None and data_parallel_size != dp:
        raise LayoutError(
            f"data_parallel_size {data_parallel_size} x tensor {tp} x pipeline {pp} x context {cp} "
            f"= {data_parallel_size * model} ranks, but {world_size} were started; start "
            f"{data_parallel_size * model}, or leave data_parallel_size empty to get {dp}"
        )
    layout = Layout(tp, pp, cp, dp, sequence_parallel)
    _check_rules(layout, zero_stage, precision)
    _check_sizes(layout, sizes or {}, num_query_groups, num_layers, seq_length)
    return layout


def _check_rules(layout: Layout, zero_stage: int, precision: str) -> None:
    """Combinations that cannot work or would train wrongly."""
    tp, pp, cp = (
        layout.tensor_parallel_size,
        layout.pipeline_parallel_size,
        layout.context_parallel_size,
    )
    if zero_stage not in (0, 1, 2, 3):
        raise LayoutError(f"zero_stage is {zero_stage}; allowed are 0, 1, 2, 3")
    if precision not in ("float32", "bfloat16"):
        raise LayoutError(f"precision is {precision!r}; allowed are float32, bfloat16")
    if precision == "bfloat16" and zero_stage == 0:
        raise LayoutError(
            "precision bfloat16 needs zero_stage 1 or higher: DeepSpeed's stage 0 takes a wrong "
            "first step in bfloat16. Stage 1 costs nothing on one rank"
        )
    if pp > 1 and zero_stage != 1:
        raise LayoutError(
            f"pipeline_parallel_size {pp} needs zero_stage 1, not {zero_stage}: stage 0 clips "
            "wrongly across stages, 2 and 3 cannot hold gradients of several micro-batches"
        )
    if pp > 1 and cp > 1:
        raise LayoutError(
            f"context_parallel_size {cp} is legal at pipeline_parallel_size 1 only, not {pp}"
        )
    if layout.sequence_parallel and tp == 1:
        raise LayoutError(
            "sequence_parallel splits over the tensor-parallel ranks, but tensor_parallel_size is "
            "1; set tensor_parallel_size to 2 or more, or sequence_parallel to false"
        )
    if layout.sequence_parallel and cp > 1:
        raise LayoutError(
            f"sequence_parallel and context_parallel_size {cp} both split the sequence; choose one"
        )


def _check_sizes(
    layout: Layout,
    sizes: Mapping[str, int],
    num_query_groups: int | None,
    num_layers: int | None,
    seq_length: int | None,
) -> None:
    """Whether the model can be cut this way."""
    tp, pp, cp = (
        layout.tensor_parallel_size,
        layout.pipeline_parallel_size,
        layout.context_parallel_size,
    )
    for name, size in sizes.items():
        if size % tp:
            raise LayoutError(
                f"tensor_parallel_size {tp} does not divide {name} {size}; "
                f"allowed here: {_divisors(size)}"
            )
    if num_query_groups is not None and num_query_groups % (tp * cp):
        raise LayoutError(
            f"num_query_groups {num_query_groups} is not divisible by tensor_parallel_size {tp} x "
            f"context_parallel_size {cp}; their product may be {_divisors(num_query_groups)}"
        )
    if num_layers is not None and num_layers < pp:
        raise LayoutError(
            f"pipeline_parallel_size {pp} is larger than num_layers {num_layers}; "
            "every stage needs a layer"
        )
    cuts = (cp if cp > 1 else 1) * (tp if layout.sequence_parallel else 1)
    if seq_length is not None and seq_length % cuts:
        raise LayoutError(
            f"the sequence is cut into {cuts} parts and seq_length {seq_length} is not divisible "
            f"by it; allowed here: {_divisors(seq_length)}"
        )


def _divisors(n: int) -> str:
    """The divisors of n that a degree may take, for messages."""
    return ", ".join(str(d) for d in range(1, min(n, 1024) + 1) if n % d == 0)


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
        """Whether activations between matrices are split over the tensor-parallel ranks."""
        return self.layout.sequence_parallel

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank embeds the tokens."""
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank computes the loss."""
        return self.pp_rank == self.pipeline_parallel_size - 1

    def stage(
        self, layer_costs: Sequence[float], first_cost: float = 0.0, last_cost: float = 0.0
    ) -> Stage:
        """The part of the model that this rank holds, stages balanced by cost (`split_layers`)."""
        cuts = split_layers(layer_costs, self.pipeline_parallel_size, first_cost, last_cost)
        return Stage(self.is_first_stage, self.is_last_stage, cuts[self.pp_rank])

    @property
    def mpu(self) -> ModelParallelUnit:
        """What DeepSpeed asks for ranks and groups."""
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
