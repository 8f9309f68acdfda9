"""Left to right, one token a forward pass; every pass recomputes its prefix (no cache)."""

from __future__ import annotations

import torch
from torch import Tensor

from pretrain.batch import AttentionRule
from pretrain.model.transformer import Transformer
from pretrain.noise.key import NoiseKey
from pretrain.sampling.draw import gumbel_argmax, sharpen


@torch.no_grad()
def sample_autoregressive(
    model: Transformer,
    prompt: Tensor,
    noise: NoiseKey,
    *,
    length: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
) -> tuple[Tensor, int]:
    """Continue `prompt` int64 [b, p] (p may be 0) to `length` tokens.

    Returns tokens int64 [b, length] and the forward passes spent.
    """
    b, given = prompt.shape
    start = torch.full((b, 1), model.space.doc_id, dtype=torch.int64, device=prompt.device)
    ids = torch.cat((start, prompt), dim=1)
    for place in range(given, length):
        positions = torch.arange(ids.shape[1], device=ids.device)[None]
        hidden = model(ids, positions, AttentionRule("causal"))
        logits = sharpen(model.vocabulary(hidden[-1]).logits, temperature, top_p)
        uniform = noise.fine_uniform("sample", logits.shape[-1], draw=place)
        ids = torch.cat((ids, gumbel_argmax(logits, uniform)[:, None]), dim=1)
    return ids[:, 1:], length - given
