"""Weights, optimizer state and averages by parameter, wherever ZeRO keeps them.

ZeRO 1 and 2 flatten the parameters of a group into one float32 tensor and shard it over the
data-parallel ranks; DeepSpeed notes for every parameter which fragment of it lies on this rank.
ZeRO 3 shards every parameter by itself. The functions here read and write whole tensors through
either, which makes a checkpoint independent of layout and ZeRO stage. Reading gathers one tensor at
a time, so that no rank ever holds more than one whole parameter.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel.engine.optimizer import COUNTER, EMA, WEIGHT, Kind, OptimizerSpec
from parallel.errors import OptimizerError
from parallel.layers import partition_dim
from parallel.layout.topology import Topology


class Updated(NamedTuple):
    """Tensor that the optimizer updates on this rank: a parameter, or a shard of flat ones."""

    tensor: Tensor
    state_group: str
    """Name of its group in the declaration of the optimizer."""


def read_full(
    parameter: nn.Parameter, kind: Kind, optimizer: torch.optim.Optimizer, topology: Topology
) -> Tensor:
    """Whole tensor, float32, on every rank; a collective over data and tensor ranks."""
    part = read_slice(parameter, kind, optimizer)
    dim = partition_dim(parameter)
    if dim is None or topology.tensor_parallel_size == 1:
        return part
    slices = [torch.empty_like(part) for _ in range(topology.tensor_parallel_size)]
    dist.all_gather(slices, part.contiguous(), group=topology.tp_group)
    return torch.cat(slices, dim)


def read_slice(parameter: nn.Parameter, kind: Kind, optimizer: torch.optim.Optimizer) -> Tensor:
    """Slice of this tensor-parallel rank, float32, gathered over the data-parallel ranks."""
    if has_fp32_copy(parameter):
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if kind == WEIGHT:
            whole = safe_get_full_fp32_param(parameter)
        else:
            _link_state(parameter, optimizer)
            whole = safe_get_full_optimizer_state(parameter, kind)
        assert whole is not None
        return whole.detach()
    held: Tensor = parameter if kind == WEIGHT else optimizer.state[parameter][kind]
    return held.detach().float()


def write_slice(
    parameter: nn.Parameter, kind: Kind, part: Tensor, optimizer: torch.optim.Optimizer
) -> None:
    """Store this tensor-parallel rank's slice, each data-parallel rank what it keeps of it."""
    part = part.to(device=parameter.device, dtype=torch.float32)
    if kind == WEIGHT:
        set_forward_weight(parameter, part)
    if _is_sharded(parameter):
        _write_shard(parameter, kind, part)
    elif kind == WEIGHT:
        if _has_fragment(parameter):
            from deepspeed.utils import safe_set_full_fp32_param

            safe_set_full_fp32_param(parameter, part)
    elif _has_fragment(parameter):
        from deepspeed.utils import safe_set_full_optimizer_state

        safe_set_full_optimizer_state(parameter, part, kind)
    else:
        optimizer.state[parameter][kind].copy_(part)


def set_forward_weight(parameter: nn.Parameter, part: Tensor) -> None:
    """Make forward passes use this tensor-parallel rank's slice; a collective over data ranks.

    The float32 copy that ZeRO keeps stays as it is, so that `read_slice` of it brings the former
    weight back. Without ZeRO the parameter is the only copy.
    """
    if not _is_sharded(parameter):
        with torch.no_grad():
            parameter.copy_(part)
        return
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters([parameter], modifier_rank=0):
        parameter.data.copy_(part)


def has_fp32_copy(parameter: nn.Parameter) -> bool:
    """True if ZeRO keeps a float32 copy of the weight that forward passes use."""
    return _is_sharded(parameter) or _has_fragment(parameter)


def updated_tensors(
    parameters: Iterable[nn.Parameter], optimizer: torch.optim.Optimizer
) -> list[Updated]:
    """Tensors that the optimizer updates on this rank."""
    groups = optimizer.param_groups
    for parameter in parameters:
        if _is_sharded(parameter):
            host: Any = parameter._z3_optimizer  # type: ignore[attr-defined]
            return [
                Updated(tensor, groups[host.sub_group_to_group_id[number]]["state_group"])
                for number, tensor in enumerate(host.fp32_partitioned_groups_flat)
            ]
    return [Updated(tensor, g["state_group"]) for g in groups for tensor in g["params"]]


def counted_updates(
    tensors: Iterable[Updated], optimizer: torch.optim.Optimizer, spec: OptimizerSpec
) -> set[int]:
    """Numbers of updates as the optimizer counts them: one, 0 before the first, or none where it
    counts for no tensor of this rank."""
    return {
        int(optimizer.state.get(tensor, {}).get(COUNTER, 0))
        for tensor, group in tensors
        if spec.group_named(group).counter is not None
    }


def create_state(
    parameters: Iterable[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    spec: OptimizerSpec,
    step: int,
    average: bool = False,
) -> None:
    """Give a fresh optimizer zero state after `step` updates; at step 0 it keeps none.

    With `average` there is state in any case, and averages that are the present weights.
    """
    parameters = list(parameters)
    optimizer.state.clear()
    if step == 0 and not average:
        return
    for tensor, name in updated_tensors(parameters, optimizer):
        group = spec.group_named(name)
        state: dict[str, Any] = {}
        if group.counter == "tensor":
            state[COUNTER] = torch.tensor(float(step), dtype=torch.float32, device=tensor.device)
        elif group.counter == "int":
            state[COUNTER] = step
        for declared in group.state:
            dtype = getattr(torch, declared.dtype)
            state[declared.name] = torch.zeros_like(tensor, dtype=dtype, requires_grad=False)
        if average:
            state[EMA] = tensor.detach().clone()
        optimizer.state[tensor] = state
    for parameter in parameters:
        _link_state(parameter, optimizer)


def check_state(
    tensors: Iterable[Updated], optimizer: torch.optim.Optimizer, spec: OptimizerSpec
) -> None:
    """Raise OptimizerError unless the optimizer, after an update, keeps the state it declares."""
    for tensor, name in tensors:
        group = spec.group_named(name)
        wanted = {declared.name: declared.dtype for declared in group.state}
        held = {k: v for k, v in optimizer.state[tensor].items() if k not in (COUNTER, EMA)}
        found = {
            key: str(value.dtype).removeprefix("torch.")
            if isinstance(value, Tensor) and value.shape == tensor.shape
            else f"{type(value).__name__} of another shape"
            for key, value in held.items()
        }
        counts = COUNTER in optimizer.state[tensor]
        if found != wanted or counts != (group.counter is not None):
            where = f" in group {name}" if name else ""
            raise OptimizerError(
                f"optimizer {spec.name} declares the state {wanted}, counter {group.counter}"
                f"{where}, and keeps {found}, {'a' if counts else 'no'} counter {COUNTER}; correct "
                "its spec()"
            )


def _link_state(parameter: nn.Parameter, optimizer: torch.optim.Optimizer) -> None:
    """Point DeepSpeed's note of the parameter at its fragment of the optimizer's state.

    DeepSpeed does this once, after the first parameter group has been updated, when the others have
    no state yet; their notes would stay empty.
    """
    note: Any = getattr(parameter, "_hp_mapping", None)
    if note is not None:
        flat = optimizer.param_groups[note.param_group_index]["params"][0]
        note.set_optim_state_fragment(flat, optimizer.state[flat])


def _write_shard(parameter: Any, kind: Kind, part: Tensor) -> None:
    """ZeRO 3: keep this rank's shard of a slice; the last shard is filled up with zeros."""
    from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

    size = parameter.ds_tensor.numel()
    rank = dist.get_rank(group=parameter.ds_process_group)
    shard = torch.zeros(size, dtype=torch.float32, device=part.device)
    values = part.flatten()[rank * size : (rank + 1) * size]
    shard[: values.numel()] = values
    if kind == WEIGHT:
        safe_set_local_fp32_param(parameter, shard)
    else:
        safe_set_local_optimizer_state(parameter, shard, kind)


def _is_sharded(parameter: nn.Parameter) -> bool:
    """True if ZeRO 3 shards this parameter."""
    return hasattr(parameter, "ds_id")


def _has_fragment(parameter: nn.Parameter) -> bool:
    """True if ZeRO 1 or 2 keeps float32 weight and state of this parameter in a flat tensor."""
    return hasattr(parameter, "_hp_mapping")
