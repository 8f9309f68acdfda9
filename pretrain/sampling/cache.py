"""Key/value cache of samplers: a pass computes only the tokens that are new.

The cache is exact for families whose attention has an order (autoregressive, block, esoteric): once
everything before a token is drawn, its keys and values cannot change. A pass with the cache gives
the same hidden states as a pass over the whole sequence, up to rounding. This holds for short
convolutions too, whose inputs are cached as well. Masked, uniform and interpolating models attend
in both directions, and nothing in them stays the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.batch import AttentionRule
from pretrain.model.transformer import Transformer

Buffers = dict[str, Tensor]
"""Cached tensors of one layer by name, each [rows, s, ...]."""


class SiteModel(Protocol):
    """Model that gives hidden states at the sites which a sampler fills in."""

    model: Transformer

    def hidden(self, ids: Tensor, rule: AttentionRule, wanted: Tensor) -> Tensor:
        """Hidden states [n, h] of the sites `wanted` bool [b, s], row by row; ids int64 [b, s]."""
        ...


class Uncached:
    """Site model that computes whole rows in every pass."""

    def __init__(self, model: Transformer) -> None:
        self.model = model

    def hidden(self, ids: Tensor, rule: AttentionRule, wanted: Tensor) -> Tensor:
        """Hidden states of `wanted` sites; see `SiteModel`."""
        active = wanted.any(dim=1)
        assert rule.columns is not None
        part = AttentionRule("columns", rule.columns[:, active])
        positions = torch.arange(ids.shape[1], device=ids.device)[None]
        hidden: Tensor = self.model(ids[active], positions, part)
        return hidden.transpose(0, 1)[wanted[active]]


class Cached:
    """Site model that keeps keys, values and inputs of convolutions of every layer."""

    def __init__(self, model: Transformer, rows: int, length: int) -> None:
        self.model, self.length = model, length
        self.final = torch.zeros(rows, length, dtype=torch.bool)
        """True at places whose keys and values can no longer change, [rows, length]."""
        self._buffers: list[Buffers] = [{} for _ in model.layers]

    def hidden(self, ids: Tensor, rule: AttentionRule, wanted: Tensor) -> Tensor:
        """Hidden states of `wanted` sites, as `SiteModel` has it.

        Computes these sites, and whatever they attend to that is not final in the cache.
        """
        self.final = self.final.to(ids.device)
        attends = rule.mask()[:, 0]  # [b, s, s]
        needed = wanted | (attends & wanted[:, :, None]).any(dim=1)
        computed = needed & ~self.final | wanted  # [b, s]
        # Rows without a wanted site are left out; the others are packed to n new tokens each.
        active = wanted.any(dim=1).nonzero()[:, 0]  # [a]
        places, real = _packed(computed[active])  # [a, n]
        mask = attends[active[:, None], places]  # [a, n, s]
        out = self.at(ids[active].gather(1, places), active, places, mask)  # [n, a, h]
        # A computed token is final if it attends to no <mask>, itself included.
        visible = ids != self.model.space.mask_id
        final = ~(attends & ~visible[:, None, :]).any(dim=2)
        self.final |= computed & final
        asked = wanted[active].gather(1, places) & real
        return out.transpose(0, 1)[asked]

    def at(self, ids: Tensor, rows: Tensor, places: Tensor, mask: Tensor) -> Tensor:
        """Hidden states [n, a, h] of tokens `ids` at `places` (both [a, n]) of `rows` [a].

        `mask` bool [a, n, s] says which places each of them attends to, cached or new.
        """
        cache = _Pass(self._buffers, len(self.final), rows, places, mask)
        hidden: Tensor = self.model(ids, places, None, cache=cache)
        return hidden


@dataclass(frozen=True)
class _Pass:
    """Cache of all layers in one pass, as `pretrain.model.cache.Cache` has it."""

    buffers: list[Buffers]
    num_rows: int
    rows: Tensor
    """Rows of the buffers that are computed, int64 [a]."""
    places: Tensor
    """Places of the new tokens in each of these rows, int64 [a, n]."""
    mask: Tensor
    """Places that each new token attends to, bool [a, n, s]."""

    def layer(self, number: int) -> _LayerPass:
        """Part of layer `number`."""
        return _LayerPass(self, self.buffers[number])


@dataclass(frozen=True)
class _LayerPass:
    """Cache of one layer in one pass, as `pretrain.model.cache.LayerCache` has it."""

    new: _Pass
    buffers: Buffers

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of q [n, a, heads, d] over cached and new keys and values."""
        rows = self.new.rows
        keys, values = (  # [a, groups, s, d]
            self._store(name, x)[rows].transpose(1, 2) for name, x in (("k", k), ("v", v))
        )
        out = F.scaled_dot_product_attention(
            q.permute(1, 2, 0, 3),
            keys,
            values,
            attn_mask=self.new.mask[:, None],
            enable_gqa=q.shape[2] != k.shape[2],
        )
        return out.permute(2, 0, 1, 3)

    def neighbours(self, place: str, x: Tensor, offsets: range) -> Tensor:
        """Inputs x of the convolution at `place`, at all offsets: [k, n, a, h]."""
        buffer, new = self._store(place, x), self.new
        reach = torch.arange(offsets.start, offsets.stop, device=x.device)
        wanted = new.places[..., None] + reach  # [a, n, k]
        there = wanted.clamp(0, self.new.mask.shape[2] - 1)
        readable = new.mask.gather(2, there) & (wanted == there)
        values = buffer[new.rows[:, None, None], there]  # [a, n, k, h]
        return torch.where(readable[..., None], values, 0.0).permute(2, 1, 0, 3)

    def _store(self, name: str, x: Tensor) -> Tensor:
        """Write x [n, a, ...] into its buffer [rows, s, ...]; returns the whole buffer."""
        if name not in self.buffers:
            shape = (self.new.num_rows, self.new.mask.shape[2], *x.shape[2:])
            self.buffers[name] = x.new_zeros(shape)
        buffer = self.buffers[name]
        buffer[self.new.rows[:, None], self.new.places] = x.transpose(0, 1)
        return buffer


def site_model(model: Transformer, rows: int, length: int, cache: bool) -> SiteModel:
    """Site model of a sampler of `rows` sequences, with or without a cache."""
    return Cached(model, rows, length) if cache else Uncached(model)


def _packed(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Places of True in `chosen` [a, s], ascending, as [a, n]; shorter rows repeat their last one.

    The second result says which entries are not such repeats.
    """
    count = chosen.sum(dim=1)
    first = torch.argsort((~chosen).int(), dim=1, stable=True)
    column = torch.arange(int(count.max()), device=chosen.device).expand(len(chosen), -1)
    real = column < count[:, None]
    return first.gather(1, torch.minimum(column, count[:, None] - 1)), real
