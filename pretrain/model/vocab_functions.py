"""Log-probabilities, and sum_v log(1 + rho p_v), in one pass over the vocabulary each way.

A cross-entropy that autograd composes passes over [n, v] seven times, and the sum in uniform and
interpolating bounds keeps four more tensors of that size. Here one is kept, and rows are computed
in slices that fit into the cache. On a CPU both cost less than a plain cross-entropy.

    d log p_i / d logit_k                 = 1[k = i] - p_k
    d sum_v log(1 + rho p_v) / d logit_k  = rho (r_k - p_k sum_j r_j),   r_j = p_j / (1 + rho p_j)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_SLICE_ON_CPU = 1 << 17
_SLICE_ON_GPU = 1 << 28
"""Elements of the logits in one slice: what fits into a core's cache, or a bound of memory."""


class LogProbability(torch.autograd.Function):
    """(logits [n, v/tp], ids [n, k], first column, ranks) -> log p(ids) [n, k].

    Under tensor parallelism every rank gets the same values, and the gradient of its columns.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, ids: Tensor, first: int, group: Any) -> Tensor:
        """Exponentiate slice by slice, keep that, then look up."""
        grown = torch.empty_like(logits)
        top, scale = logits.new_empty(2, logits.shape[0], 1)
        for rows in row_slices(logits):
            torch.amax(logits[rows], dim=-1, keepdim=True, out=top[rows])
            torch.sub(logits[rows], top[rows], out=grown[rows]).exp_()
            torch.sum(grown[rows], dim=-1, keepdim=True, out=scale[rows])
        whole = top.clone()
        reduce(whole, group, torch.distributed.ReduceOp.MAX)
        shrink = (top - whole).exp_()  # to the largest logit of all ranks; 1 where there is one
        scale.mul_(shrink)
        reduce(scale, group)
        local, mine, picked = _look_up(logits, ids, first, group)
        ctx.save_for_backward(grown, local, mine, shrink.div_(scale))
        return picked - (whole + scale.log())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        """Gradient of this rank's columns, written into the kept tensor; needs no reduction.

        A second backward pass through the same graph is therefore an error, which autograd raises.
        """
        (log_grad,) = grads
        grown, local, mine, share = ctx.saved_tensors
        gradient = grown.mul_(share * -log_grad.sum(dim=-1, keepdim=True))
        gradient.scatter_add_(1, local, log_grad * mine)
        return gradient, None, None, None


class Log1pSum(torch.autograd.Function):
    """(logits [n, v/tp], ids [n, k], rho [n], first column, ranks) -> log p(ids) [n, k], sums [n].

    Rows are in float32 or float64 like the logits; tensor parallelism as in `LogProbability`.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, ids: Tensor, rho: Tensor, first: int, group: Any
    ) -> tuple[Tensor, Tensor]:
        """One slice of rows after another: shift, exponentiate, reduce."""
        log_scale = log_sum_exp(logits, group)
        sums = logits.new_empty(2, logits.shape[0])
        for rows in row_slices(logits):
            p = (logits[rows] - log_scale[rows, None]).exp_()
            growth = p * rho[rows, None]
            sums[0, rows] = growth.log1p().sum(dim=-1)
            sums[1, rows] = p.div_(growth.add_(1.0)).sum(dim=-1)
        reduce(sums, group)
        local, mine, picked = _look_up(logits, ids, first, group)
        ctx.save_for_backward(logits, local, mine, rho, log_scale, sums[1])
        return picked - log_scale[:, None], sums[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        """Gradient of this rank's columns; no reduction is left to do."""
        log_grad, sum_grad = grads
        logits, local, mine, rho, log_scale, total_r = ctx.saved_tensors
        gradient = torch.empty_like(logits)
        sum_grad = sum_grad * rho
        pull = log_grad.sum(dim=-1) + sum_grad * total_r
        for rows in row_slices(logits):
            p = (logits[rows] - log_scale[rows, None]).exp_()
            push = sum_grad[rows, None] / (p * rho[rows, None]).add_(1.0)
            torch.mul(p, push.sub_(pull[rows, None]), out=gradient[rows])
        gradient.scatter_add_(1, local, log_grad * mine)
        return gradient, None, None, None, None


def log_sum_exp(logits: Tensor, group: Any) -> Tensor:
    """log of the partition sum over all ranks' columns, [n]."""
    top = logits.amax(dim=-1)
    reduce(top, group, torch.distributed.ReduceOp.MAX)
    scale = torch.empty_like(top)
    for rows in row_slices(logits):
        scale[rows] = (logits[rows] - top[rows, None]).exp_().sum(dim=-1)
    reduce(scale, group)
    return top + scale.log()


def _look_up(logits: Tensor, ids: Tensor, first: int, group: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Local columns of ids [n, k], whether this rank has them, and their logits on every rank."""
    v = logits.shape[-1]
    local = ids - first
    mine = (local >= 0) & (local < v)
    local = local.clamp(0, v - 1)
    picked = torch.where(mine, logits.gather(1, local), 0.0)
    reduce(picked, group)
    return local, mine, picked


def row_slices(logits: Tensor) -> list[slice]:
    """Slices of rows of a bounded number of elements."""
    n, v = logits.shape
    elements = _SLICE_ON_CPU if logits.device.type == "cpu" else _SLICE_ON_GPU
    step = max(1, elements // v)
    return [slice(start, min(start + step, n)) for start in range(0, n, step)]


def reduce(
    values: Tensor,
    group: Any,
    op: torch.distributed.ReduceOp.RedOpType = torch.distributed.ReduceOp.SUM,
) -> None:
    """Reduce `values` in place over the ranks of `group`."""
    if group.size() > 1:
        torch.distributed.all_reduce(values, op=op, group=group)
