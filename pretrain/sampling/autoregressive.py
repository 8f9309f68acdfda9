"""Autoregressive sampling: left to right, one token a forward pass, with a key-value cache."""

from __future__ import annotations

import torch
from torch import Tensor

from pretrain.batch import AttentionRule
from pretrain.model.transformer import Transformer
from pretrain.noise.key import NoiseKey
from pretrain.sampling.cache import Cached
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
    cache: bool = True,
) -> tuple[Tensor, int]:
    """Continue `prompt` int64 [b, p] (p may be 0) to `length` tokens.

    Returns tokens int64 [b, length] and the forward passes spent. Without `cache` every pass
    computes the whole prefix.
    """
    b, given = prompt.shape
    start = torch.full((b, 1), model.space.doc_id, dtype=torch.int64, device=prompt.device)
    ids = torch.cat((start, prompt), dim=1)
    kept = Cached(model, b, length) if cache else None
    for place in range(given, length):
        hidden = _plain(model, ids) if kept is None else _new(kept, ids, place == given)
        logits = sharpen(model.vocabulary(hidden).logits, temperature, top_p)
        uniform = noise.fine_uniform("sample", logits.shape[-1], draw=place)
        ids = torch.cat((ids, gumbel_argmax(logits, uniform)[:, None]), dim=1)
    return ids[:, 1:], length - given


def _plain(model: Transformer, ids: Tensor) -> Tensor:
    """Hidden states [b, h] after the last of `ids` [b, n]."""
    positions = torch.arange(ids.shape[1], device=ids.device)[None]
    hidden: Tensor = model(ids, positions, AttentionRule("causal"))
    return hidden[-1]


def _new(kept: Cached, ids: Tensor, first: bool) -> Tensor:
    """Hidden states [b, h] after the last token, from the cache, which is empty where `first`."""
    b, n = ids.shape
    start = 0 if first else n - 1
    places = torch.arange(start, n, device=ids.device).expand(b, -1)
    mask = torch.arange(kept.length, device=ids.device) <= places[..., None]
    rows = torch.arange(b, device=ids.device)
    return kept.at(ids[:, start:], rows, places, mask)[-1]
