"""Drawing from categorical distributions in float64.

float32 uniforms truncate the tail of the Gumbel distribution at -log(2^-24). Rare tokens are then
drawn too rarely, which acts like a lower temperature and improves generation metrics wrongly
(arXiv 2409.02908). Every draw here is keyed and uses 52-bit uniforms, so that a sample does not
depend on its batch.
"""

from __future__ import annotations

import torch
from torch import Tensor


def gumbel_argmax(log_probability: Tensor, uniform: Tensor) -> Tensor:
    """Draw exactly from categoricals; returns int64 [...].

    log_probability [..., v] may be unnormalised, uniform is in (0, 1); both are float64.
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
