"""Rules of legal layouts: pure arithmetic, done before any process group or even torch exists.

A new rule is a branch here and a row in the table of its test.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from parallel.errors import LayoutError
from parallel.layout.stages import check_stages


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
    """Legal layout for these degrees, or LayoutError with what is allowed.

    `data_parallel_size` None takes the ranks that the other degrees leave. `sizes` names model
    dimensions that tensor parallelism divides (heads, MLP width, padded vocabulary);
    `num_query_groups` is divided by tensor and context parallelism together.
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
            key = name if name == "world_size" else f"parallel.{name}"
            raise LayoutError(f"{key} is {size}; it must be 1 or more")
    dp = find_data_parallel_size(world_size, tp, pp, cp, data_parallel_size)
    layout = Layout(tp, pp, cp, dp, sequence_parallel)
    check_rules(layout, zero_stage, precision)
    check_sizes(layout, sizes or {}, num_query_groups, num_layers, seq_length)
    return layout


def find_data_parallel_size(world_size: int, tp: int, pp: int, cp: int, asked: int | None) -> int:
    """Number of data-parallel ranks that the other degrees leave of all ranks.

    Raises LayoutError where it is not whole, or not the number that was asked for.
    """
    model = tp * pp * cp
    degrees = f"tensor {tp} x pipeline {pp} x context {cp}"
    if world_size % model:
        raise LayoutError(
            f"{degrees} = {model} does not divide the {world_size} ranks; start a multiple of "
            f"{model} ranks or lower a degree of parallel.*"
        )
    found = world_size // model
    if asked not in (None, found):
        raise LayoutError(
            f"parallel.data_parallel_size {asked} x {degrees} = {asked * model} ranks, but there "
            f"are {world_size}; start {asked * model}, set it to {found}, or leave it empty"
        )
    return found


def check_rules(
    layout: Layout,
    zero_stage: int,
    precision: str,
    offload: str = "none",
    overlap_comm: bool | None = None,
) -> None:
    """Refuse, by LayoutError, combinations that cannot work or would train wrongly."""
    tp, pp, cp = (
        layout.tensor_parallel_size,
        layout.pipeline_parallel_size,
        layout.context_parallel_size,
    )
    if zero_stage not in (0, 1, 2, 3):
        raise LayoutError(f"parallel.zero_stage is {zero_stage}; allowed are 0, 1, 2, 3")
    if precision not in ("float32", "bfloat16"):
        raise LayoutError(f"train.precision is {precision!r}; allowed are float32, bfloat16")
    if precision == "bfloat16" and zero_stage == 0:
        raise LayoutError(
            "train.precision bfloat16 needs parallel.zero_stage 1 or higher, not 0: DeepSpeed's "
            "stage 0 makes a wrong first step in bfloat16. Stage 1 costs nothing on one rank"
        )
    if offload not in ("none", "cpu"):
        raise LayoutError(f"parallel.offload is {offload!r}; allowed are none, cpu")
    if offload != "none" and zero_stage == 0:
        raise LayoutError(
            f"parallel.offload {offload} needs parallel.zero_stage 1 or higher, not 0: stage 0 "
            "keeps optimizer state where the weights are"
        )
    obstacle = overlap_obstacle(layout, zero_stage, precision, offload)
    if overlap_comm and obstacle is not None:
        raise LayoutError(
            f"parallel.overlap_comm true has no effect {obstacle}; leave it empty, or set "
            "parallel.zero_stage to 2 or 3 without a pipeline"
        )
    if pp > 1 and zero_stage != 1:
        raise LayoutError(
            f"parallel.pipeline_parallel_size {pp} needs parallel.zero_stage 1, not {zero_stage}: "
            "stage 0 clips wrongly across stages, 2 and 3 cannot hold gradients of several "
            "micro-batches"
        )
    if pp > 1 and cp > 1:
        raise LayoutError(
            f"parallel.context_parallel_size {cp} is legal at parallel.pipeline_parallel_size 1 "
            f"only, not {pp}"
        )
    if layout.sequence_parallel and tp == 1:
        raise LayoutError(
            "parallel.sequence_parallel splits over the tensor-parallel ranks, but "
            "parallel.tensor_parallel_size is 1; set that to 2 or more, or "
            "parallel.sequence_parallel to false"
        )
    if layout.sequence_parallel and cp > 1:
        raise LayoutError(
            f"parallel.sequence_parallel and parallel.context_parallel_size {cp} both split the "
            "sequence; choose one"
        )


def effective_stage(layout: Layout, zero_stage: int, precision: str, offload: str = "none") -> int:
    """ZeRO stage that DeepSpeed is given.

    On one data-parallel rank there is nothing to shard: stages 1-3 would only keep a second copy of
    float32 weights and copy every gradient. Offloading is theirs, so it keeps them.
    """
    shards = layout.data_parallel_size * layout.context_parallel_size
    alone = shards == 1 and layout.pipeline_parallel_size == 1
    plain = precision == "float32" and offload == "none"
    return 0 if alone and plain else zero_stage


def overlaps(zero_stage: int, asked: bool | None) -> bool:
    """True if DeepSpeed is to reduce gradients during the backward pass; by default at stage 3.

    There it also prefetches weights, and this is its usual mode. Stages 1 and 2 have repeatedly
    reduced wrong gradients in this mode (buffers reused too early; last fixed in 0.19), and wait
    for the device after every backward pass. So the default is off there, until both modes have
    been compared on GPUs.
    """
    return zero_stage == 3 if asked is None else asked


def overlap_obstacle(
    layout: Layout, zero_stage: int, precision: str, offload: str = "none"
) -> str | None:
    """Layout in which DeepSpeed never reduces during the backward pass, in words; else None."""
    if zero_stage == 0:
        return "at zero_stage 0: gradients are reduced once, after the last backward pass"
    if layout.pipeline_parallel_size > 1:
        return "in a pipeline: its stages reduce when all micro-batches are through"
    if zero_stage == 1 and precision == "bfloat16" and offload == "none":
        return "at zero_stage 1 in bfloat16: DeepSpeed adds up in float32 and reduces at the end"
    return None


def check_sizes(
    layout: Layout,
    sizes: Mapping[str, int],
    num_query_groups: int | None,
    num_layers: int | None,
    seq_length: int | None,
) -> None:
    """Refuse, by LayoutError, degrees that do not divide the model."""
    tp, pp, cp = (
        layout.tensor_parallel_size,
        layout.pipeline_parallel_size,
        layout.context_parallel_size,
    )
    for name, size in sizes.items():
        if size % tp:
            raise LayoutError(
                f"parallel.tensor_parallel_size {tp} does not divide {name} {size}; "
                f"allowed here: {_listed(size)}"
            )
    if num_query_groups is not None and num_query_groups % (tp * cp):
        raise LayoutError(
            f"model.num_query_groups {num_query_groups} is not divisible by "
            f"parallel.tensor_parallel_size {tp} x parallel.context_parallel_size {cp}; their "
            f"product may be {_listed(num_query_groups)}"
        )
    if num_layers is not None:
        check_stages(num_layers, pp)
    parts = cp * (tp if layout.sequence_parallel else 1)
    if seq_length is not None and seq_length % parts:
        raise LayoutError(
            f"the sequence is split into {parts} parts and data.seq_length {seq_length} is not "
            f"divisible by it; allowed here: {_listed(seq_length)}"
        )


def split_batch(
    global_batch_size: int, micro_batch_size: int | None, data_parallel_size: int
) -> tuple[int, int]:
    """Sequences of a forward pass and forward passes of a step, on each rank.

    `micro_batch_size` None takes all sequences of a rank at once. Raises LayoutError where the
    batch does not divide, with the sizes that would.
    """
    if global_batch_size % data_parallel_size:
        raise LayoutError(
            f"train.global_batch_size {global_batch_size} is not divisible by the "
            f"{data_parallel_size} data-parallel ranks; take a multiple of {data_parallel_size}, "
            f"or a parallel.data_parallel_size of {_listed(global_batch_size)}"
        )
    per_rank = global_batch_size // data_parallel_size
    micro = micro_batch_size or per_rank
    if per_rank % micro:
        raise LayoutError(
            f"train.micro_batch_size {micro} does not divide the {per_rank} sequences of a rank "
            f"(train.global_batch_size {global_batch_size} over {data_parallel_size} data-parallel "
            f"ranks); allowed here: {_listed(per_rank)}"
        )
    return micro, per_rank // micro


def divisors(n: int, largest: int = 1024) -> list[int]:
    """Divisors of n up to `largest`, ascending."""
    return [d for d in range(1, min(n, largest) + 1) if n % d == 0]


def _listed(n: int) -> str:
    """Divisors of n that a degree may take, for messages."""
    return ", ".join(map(str, divisors(n)))
