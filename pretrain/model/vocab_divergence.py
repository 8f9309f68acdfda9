"""KL divergence between two distributions over the vocabulary, in one pass, forward and back.

Only the two tensors of logits are saved. Rows are computed in slices that fit into the cache.

    reverse   KL(p || q)     d / d logit_k of p  =  p_k (log p_k - log q_k - KL)
    forward   KL(q || p)     d / d logit_k of p  =  p_k - q_k
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pretrain.model.vocab_functions import log_sum_exp, reduce, row_slices


class Divergence(torch.autograd.Function):
    """(logits of p [n, v/tp], logits of q [n, v/tp], reverse, ranks) -> KL [n]; q is a constant.

    Columns that hold -inf in both have probability zero. Under tensor parallelism every rank gets
    the same values, and the gradient of its columns.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, reference: Tensor, reverse: bool, group: Any) -> Tensor:
        """Normalisers, then one slice of rows after another."""
        scales = log_sum_exp(logits, group), log_sum_exp(reference, group)
        total = logits.new_empty(logits.shape[0])
        for rows in row_slices(logits):
            log_p, log_q = _log_probabilities(logits, reference, scales, rows)
            gap = log_p - log_q if reverse else log_q - log_p
            # An excluded column: -inf minus -inf.
            gap.nan_to_num_(nan=0.0)
            total[rows] = (log_p if reverse else log_q).exp_().mul_(gap).sum(dim=-1)
        reduce(total, group)
        ctx.save_for_backward(logits, reference, *scales, total)
        ctx.reverse = reverse
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        """Gradient of this rank's columns; no reduction is left to do."""
        (grad,) = grads
        logits, reference, *scales, total = ctx.saved_tensors
        gradient = torch.empty_like(logits)
        for rows in row_slices(logits):
            log_p, log_q = _log_probabilities(logits, reference, tuple(scales), rows)
            if ctx.reverse:
                gap = (log_p - log_q).nan_to_num_(nan=0.0).sub_(total[rows, None])
                part = log_p.exp_().mul_(gap)
            else:
                part = log_p.exp_().sub_(log_q.exp_())
            torch.mul(part, grad[rows, None], out=gradient[rows])
        return gradient, None, None, None


def _log_probabilities(
    logits: Tensor, reference: Tensor, scales: tuple[Tensor, ...], rows: slice
) -> tuple[Tensor, Tensor]:
    """log p and log q of a slice of rows."""
    log_p = logits[rows] - scales[0][rows, None]
    return log_p, reference[rows] - scales[1][rows, None]
