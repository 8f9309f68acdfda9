"""Samplers of families whose attention has an order: block diffusion and Eso-LM.

Both hold one copy of the sequence, with its true positions and an order of its tokens. Later tokens
attend to the drawn ones, exactly as to the clean half in training. Keys and values of drawn tokens
are therefore final, and a `Cached` model computes each of them once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pretrain.batch import AttentionRule
from pretrain.model.transformer import Transformer
from pretrain.noise.key import NoiseKey
from pretrain.sampling.cache import SiteModel, site_model
from pretrain.sampling.draw import gumbel_argmax, sharpen


@torch.no_grad()
def sample_block(
    model: Transformer,
    prompt: Tensor,
    noise: NoiseKey,
    *,
    block_size: int,
    length: int,
    steps: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    cache: bool = True,
) -> tuple[Tensor, Tensor]:
    """Draw blocks from left to right, each by `steps` masked ancestral steps over its tokens.

    `prompt` int64 [b, p] is kept; returns tokens int64 [b, length] and forward passes, int64 [b].
    `cache` keeps keys and values of finished blocks.
    """
    ids = _start(model, prompt, length)
    place = torch.arange(length, device=ids.device)
    block = (place // block_size).expand_as(ids)
    rule = AttentionRule.from_columns(torch.zeros_like(block), block, block, block)
    evaluations = torch.zeros(len(ids), dtype=torch.int64, device=ids.device)
    sites = site_model(model, len(ids), length, cache)
    for number in range(-(-length // block_size)):
        for step in range(steps):
            # Reveal with probability 1 / (T t), t = (T - step) / T: exactly 1 in the last step.
            u = noise.uniform("reveal", length, draw=step)
            reveal = (u * (steps - step) < 1.0) & (block == number)
            _draw(sites, ids, reveal, rule, noise, evaluations, temperature, top_p)
    return ids, evaluations


@torch.no_grad()
def sample_esoteric(
    model: Transformer,
    prompt: Tensor,
    noise: NoiseKey,
    *,
    alpha0: float,
    length: int,
    steps: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    cache: bool = True,
) -> tuple[Tensor, Tensor]:
    """Draw a share alpha0 of the tokens by `steps` diffusion steps, the rest left to right.

    From t to s a masked token is revealed with probability (alpha_s - alpha_t) / (1 - alpha_t),
    alpha_t = alpha0 (1 - t). Attention follows the order in which tokens were drawn, and a random
    order for those of one step.

    `prompt` int64 [b, p] is kept; returns tokens and forward passes [b]. `cache` keeps keys and
    values of drawn tokens.
    """
    ids = _start(model, prompt, length)
    b, given = prompt.shape
    evaluations = torch.zeros(b, dtype=torch.int64, device=ids.device)
    place = torch.arange(length, device=ids.device).expand(b, length)
    shuffle = noise.fine_uniform("order", length)
    inside = place.double() / length
    when = torch.where(place < given, inside - 1.0, torch.inf)

    sites = site_model(model, b, length, cache)

    def reveal_now(reveal: Tensor, moment: float, within: Tensor) -> None:
        """Draw the sites of `reveal` [b, length], in order after all visible ones."""
        hidden = ids == model.space.mask_id
        when[reveal & hidden] = moment + within[reveal & hidden]
        order = torch.where(when.isinf(), 2.0 * (steps + length) + place, when)
        rank = order.argsort(dim=1).argsort(dim=1)
        rule = AttentionRule.from_columns(torch.zeros_like(rank), rank, rank, rank)
        _draw(sites, ids, reveal, rule, noise, evaluations, temperature, top_p)

    for step in range(steps):
        before = 1.0 - alpha0 * step / steps  # 1 - alpha_t
        chance = alpha0 / steps / before
        reveal = noise.uniform("reveal", length, draw=step) < chance
        if alpha0 == 1 and step == steps - 1:
            reveal = torch.ones_like(reveal)
        reveal_now(reveal, float(step), shuffle)
    while bool((ids == model.space.mask_id).any()):
        hidden = ids == model.space.mask_id
        first = hidden & (hidden.cumsum(dim=1) == 1)
        reveal_now(first, float(steps), inside)
    return ids, evaluations


def _start(model: Transformer, prompt: Tensor, length: int) -> Tensor:
    """Prompt, then <mask>: int64 [b, length]."""
    ids = torch.full(
        (len(prompt), length), model.space.mask_id, dtype=torch.int64, device=prompt.device
    )
    ids[:, : prompt.shape[1]] = prompt
    return ids


def _draw(
    sites: SiteModel,
    ids: Tensor,
    reveal: Tensor,
    rule: AttentionRule,
    noise: NoiseKey,
    evaluations: Tensor,
    temperature: float,
    top_p: float,
) -> None:
    """Fill the masked sites of `reveal` [b, s] in place; rows without such a site cost nothing."""
    wanted = reveal & (ids == sites.model.space.mask_id)
    rows, columns = wanted.nonzero(as_tuple=True)
    if not len(rows):
        return
    evaluations[rows.unique()] += 1
    hidden = sites.hidden(ids, rule, wanted)
    logits = sharpen(sites.model.vocabulary(hidden).logits, temperature, top_p)
    # Keyed by row and column: every masked site has a separate stream of uniforms.
    site = noise.at(noise.position[rows] * ids.shape[1] + columns)
    ids[rows, columns] = gumbel_argmax(logits, site.fine_uniform("sample", logits.shape[-1]))
