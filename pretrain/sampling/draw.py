"""Drawing from categoricals in float64.

float32 uniforms cut the Gumbel tail at -log(2^-24): rare tokens come out too rarely, which acts
like a lower temperature and flatters generation metrics (arXiv 2409.02908). Every draw here is
keyed, with 52-bit uniforms, so that a sample does not depend on the batch it was drawn in.
"""

from __future__ import annotations

import torch
from torch import Tensor


def gumbel_argmax(log_probability: Tensor, uniform: Tensor) -> Tensor:
    """Exact draw from categoricals: log_probability [..., v] (unnormalised), uniform in (0, 1).

    Returns int64 [...]; both arguments float64.
    """
    assert log_probability.dtype == uniform.dtype == torch.float64
    return (log_probability - torch.log(-torch.log(uniform))).argmax(dim=-1)


def sharpen(logits: Tensor, temperature: float, top_p: float) -> Tensor:
    """Log probabilities (unnormalised) after temperature and nucleus, float64 [..., v].

    The nucleus keeps the smallest set of most likely tokens whose mass reaches top_p, the token
    that crosses it included (arXiv 1904.09751). Temperature 0 is the mode.
    """
    logits = logits.double()
    if temperature == 0:
        best = logits.argmax(dim=-1, keepdim=True)
        return torch.full_like(logits, -torch.inf).scatter(-1, best, 0.0)
    logits = logits / temperature
    if top_p >= 1:
        return logits
    ordered, order = logits.sort(dim=-1, descending=True)
    mass = ordered.softmax(dim=-1).cumsum(dim=-1)
    before = mass - ordered.softmax(dim=-1)
    kept = torch.where(before < top_p, ordered, -torch.inf)
    return torch.empty_like(logits).scatter(-1, order, kept)
