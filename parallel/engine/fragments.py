"""Float32 weights, Adam moments and averaged weights by parameter, wherever ZeRO keeps them.

ZeRO 1 and 2 flatten parameters into groups and give every data-parallel rank a stretch of each;
DeepSpeed links every parameter to its stretch. ZeRO 3 cuts every parameter by itself. These
functions read and write whole tensors through either, which is what makes a checkpoint independent
of layout and ZeRO stage. Reading gathers one tensor at a time, so that no rank ever holds more than
one whole parameter.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel.layers import partition_dim
from parallel.layout.topology import Topology

Kind = Literal["weight", "exp_avg", "exp_avg_sq", "ema", "teacher"]
MOMENTS: tuple[Kind, ...] = ("exp_avg", "exp_avg_sq")
EMA: Kind = "ema"
"""The averaged weights (`parallel.engine.average`): one more moment that the optimizer ignores."""
TEACHER: Kind = "teacher"
"""Weights of a frozen copy of the model, which the engine carries without training it."""


def read_full(
    parameter: nn.Parameter, kind: Kind, optimizer: torch.optim.Optimizer, topology: Topology
) -> Tensor:
    """The whole tensor, float32, on every rank; a collective over data and tensor ranks."""
    own = read_slice(parameter, kind, optimizer)
    dim = partition_dim(parameter)
    if dim is None or topology.tensor_parallel_size == 1:
        return own
    slices = [torch.empty_like(own) for _ in range(topology.tensor_parallel_size)]
    dist.all_gather(slices, own.contiguous(), group=topology.tp_group)
    return torch.cat(slices, dim)


def write_slice(
    parameter: nn.Parameter, kind: Kind, own: Tensor, optimizer: torch.optim.Optimizer
) -> None:
    """Store this tensor-parallel rank's slice where this rank keeps (its stretch of) it."""
    own = own.to(device=parameter.device, dtype=torch.float32)
    if kind == "weight":
        show(parameter, own)
    if _is_cut(parameter):
        _write_cut(parameter, kind, own)
    elif kind == "weight":
        if _is_linked(parameter):
            from deepspeed.utils import safe_set_full_fp32_param

            safe_set_full_fp32_param(parameter, own)
    elif _is_linked(parameter):
        from deepspeed.utils import safe_set_full_optimizer_state

        safe_set_full_optimizer_state(parameter, own, kind)
    else:
        optimizer.state[parameter][kind].copy_(own)


def show(parameter: nn.Parameter, own: Tensor) -> None:
    """Let forward passes see this tensor-parallel rank's slice; a collective over data ranks.

    The float32 weight that ZeRO keeps stays as it is, so that `show(parameter, read_slice(...))` of
    it brings the former weight back. Without ZeRO the parameter is that weight.
    """
    if not _is_cut(parameter):
        with torch.no_grad():
            parameter.copy_(own)
        return
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters([parameter], modifier_rank=0):
        parameter.data.copy_(own)


def has_own_master(parameter: nn.Parameter) -> bool:
    """Whether ZeRO keeps a float32 weight besides the one that forward passes see."""
    return _is_cut(parameter) or _is_linked(parameter)


def optimizer_step(parameters: Iterable[nn.Parameter], optimizer: torch.optim.Optimizer) -> int:
    """Updates applied so far; the same for every parameter."""
    steps = {
        int(optimizer.state[p]["step"]) if "step" in optimizer.state.get(p, {}) else 0
        for p in held_tensors(parameters, optimizer)
    }
    assert len(steps) == 1, f"parameters have seen different numbers of updates: {steps}"
    return steps.pop()


def create_moments(
    parameters: Iterable[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    step: int,
    average: bool = False,
) -> None:
    """Zero moments after `step` updates, in a fresh optimizer; step 0 leaves it without any.

    With `average` there are moments in any case, and averaged weights that are the present ones.
    """
    parameters = list(parameters)
    optimizer.state.clear()
    if step == 0 and not average:
        return
    for held in held_tensors(parameters, optimizer):
        optimizer.state[held] = {
            "step": torch.tensor(float(step), dtype=torch.float32, device=held.device),
            "exp_avg": torch.zeros_like(held, requires_grad=False),
            "exp_avg_sq": torch.zeros_like(held, requires_grad=False),
        }
        if average:
            optimizer.state[held][EMA] = held.detach().clone()
    for parameter in parameters:
        _link_moments(parameter, optimizer)


def held_tensors(
    parameters: Iterable[nn.Parameter], optimizer: torch.optim.Optimizer
) -> list[Tensor]:
    """The tensors that AdamW updates on this rank: parameters, or flat stretches of them."""
    for parameter in parameters:
        if _is_cut(parameter):
            host: Any = parameter._z3_optimizer  # type: ignore[attr-defined]
            return list(host.fp32_partitioned_groups_flat)
    return [held for group in optimizer.param_groups for held in group["params"]]


def read_slice(parameter: nn.Parameter, kind: Kind, optimizer: torch.optim.Optimizer) -> Tensor:
    """This tensor-parallel rank's slice, float32, gathered over the data-parallel ranks."""
    if _is_cut(parameter) or _is_linked(parameter):
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if kind == "weight":
            whole = safe_get_full_fp32_param(parameter)
        else:
            _link_moments(parameter, optimizer)
            whole = safe_get_full_optimizer_state(parameter, kind)
        assert whole is not None
        return whole.detach()
    if kind == "weight":
        return parameter.detach().float()
    moment: Tensor = optimizer.state[parameter][kind]
    return moment.detach()


def _link_moments(parameter: nn.Parameter, optimizer: torch.optim.Optimizer) -> None:
    """Point the parameter's link at its stretch of the moments.

    DeepSpeed does this once, after the first parameter group has been updated, when the others have
    no moments yet; their links would stay empty.
    """
    link: Any = getattr(parameter, "_hp_mapping", None)
    if link is not None:
        stretch = optimizer.param_groups[link.param_group_index]["params"][0]
        link.set_optim_state_fragment(stretch, optimizer.state[stretch])


def _write_cut(parameter: Any, kind: Kind, own: Tensor) -> None:
    """ZeRO 3: keep this rank's piece; the last piece is filled up with zeros."""
    from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

    size = parameter.ds_tensor.numel()
    rank = dist.get_rank(group=parameter.ds_process_group)
    piece = torch.zeros(size, dtype=torch.float32, device=own.device)
    part = own.flatten()[rank * size : (rank + 1) * size]
    piece[: part.numel()] = part
    if kind == "weight":
        safe_set_local_fp32_param(parameter, piece)
    else:
        safe_set_local_optimizer_state(parameter, piece, kind)


def _is_cut(parameter: nn.Parameter) -> bool:
    """Whether ZeRO 3 holds this parameter in pieces."""
    return hasattr(parameter, "ds_id")


def _is_linked(parameter: nn.Parameter) -> bool:
    """Whether ZeRO 1 or 2 holds the float32 weight and moments of this parameter."""
    return hasattr(parameter, "_hp_mapping")
