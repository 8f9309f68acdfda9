"""Log-probability of a token and mean embedding under softmax(logits + query . table), in one pass.

For a table of embeddings e_v [v, d] and queries q [n, d]:

    f_v = logits_v + q . e_v,   p = softmax(f),   log p_x,   m = sum_v p_v e_v

f and p exist only for a slice of rows at a time, and only the logits are saved. The backward pass,
for gradients c of log p_x and g of m:

    d f_v = p_v (g . (e_v - m) - c) + c 1[v = x],   d q = sum_v d f_v e_v
    d e_v = sum_n (p_v g + d f_v q),   over the rows n that `learns` names
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pretrain.model.vocab_functions import reduce, row_slices


class VocabularyMean(torch.autograd.Function):
    """(logits [n, v/tp], q [n, d], table [v/tp, d], x [n], learns [n], first column, ranks)
    -> log p_x, m.

    All floats in one precision; results [n] and [n, d] are the same on every tensor-parallel rank,
    and gradients need no further reduction.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        query: Tensor,
        table: Tensor,
        targets: Tensor,
        learns: Tensor,
        first: int,
        group: Any,
    ) -> tuple[Tensor, Tensor]:
        """One slice of rows after another: add, shift, exponentiate, reduce."""
        n, v = logits.shape
        local = targets - first
        mine = (local >= 0) & (local < v)
        local = local.clamp(0, v - 1)
        own_top, sums = logits.new_empty(n), logits.new_empty(n, table.shape[1] + 2)
        for rows in row_slices(logits):
            f = torch.addmm(logits[rows], query[rows], table.t())
            sums[rows, 0] = torch.where(mine[rows], f.gather(1, local[rows, None])[:, 0], 0.0)
            # A rank may hold nothing but excluded columns: their -inf must not meet itself.
            own_top[rows] = f.amax(dim=-1).clamp_(min=torch.finfo(f.dtype).min)
            p = f.sub_(own_top[rows, None]).exp_()
            sums[rows, 1] = p.sum(dim=-1)
            sums[rows, 2:] = p @ table
        ctx.group = group
        top = own_top.clone()
        reduce(top, group, torch.distributed.ReduceOp.MAX)
        sums[:, 1:] *= (own_top - top).exp()[:, None]
        reduce(sums, group)
        log_scale = top + sums[:, 1].log()
        mean = sums[:, 2:] / sums[:, 1:2]
        ctx.save_for_backward(logits, query, table, local, mine, learns, log_scale, mean)
        return sums[:, 0] - log_scale, mean

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of this rank's columns, and of the queries summed over ranks."""
        log_grad, mean_grad = grads
        logits, query, table, local, mine, learns, log_scale, mean = ctx.saved_tensors
        to_logits, to_query = torch.empty_like(logits), torch.empty_like(query)
        to_table = torch.zeros_like(table)
        pull = (mean_grad * mean).sum(dim=-1) + log_grad
        for rows in row_slices(logits):
            p = torch.addmm(logits[rows], query[rows], table.t()).sub_(log_scale[rows, None]).exp_()
            push = (mean_grad[rows] @ table.t()).sub_(pull[rows, None])
            d = torch.mul(p, push, out=to_logits[rows])
            d.scatter_add_(1, local[rows, None], (log_grad[rows] * mine[rows])[:, None])
            to_query[rows] = d @ table
            keep = learns[rows, None].to(p.dtype)
            to_table += p.t() @ (mean_grad[rows] * keep) + d.t() @ (query[rows] * keep)
        reduce(to_query, ctx.group)
        return to_logits, to_query, to_table, None, None, None, None
