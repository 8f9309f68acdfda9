"""Keys and values of tokens that cannot change any more, so that a pass computes only what is new.

Exact for families that read in an order (autoregressive, block, esoteric): what a token reads is
then fixed once everything before it is. A cached pass gives the same hidden states as a pass over
the whole sequence, up to rounding, also with short convolutions, whose inputs are kept too. Masked,
uniform and interpolating models read in both directions and have nothing that stays.
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
"""Kept tensors of one layer by name, each [rows, s, ...]."""


class Reader(Protocol):
    """A network asked about sites of a sequence that a sampler fills in."""

    model: Transformer

    def hidden(self, ids: Tensor, rule: AttentionRule, wanted: Tensor) -> Tensor:
        """Hidden states [n, h] of the sites `wanted` bool [b, s], row by row; ids int64 [b, s]."""
        ...


class Recompute:
    """Runs every row that is asked about from its beginning."""

    def __init__(self, model: Transformer) -> None:
        self.model = model

    def hidden(self, ids: Tensor, rule: AttentionRule, wanted: Tensor) -> Tensor:
        """See `Reader`."""
        active = wanted.any(dim=1)
        assert rule.columns is not None
        part = AttentionRule("columns", rule.columns[:, active])
        positions = torch.arange(ids.shape[1], device=ids.device)[None]
        hidden: Tensor = self.model(ids[active], positions, part)
        return hidden.transpose(0, 1)[wanted[active]]


class Cached:
    """Keeps keys, values and inputs of convolutions of every layer, by row and place."""

    def __init__(self, model: Transformer, rows: int, length: int) -> None:
        self.model, self.length = model, length
        self.final = torch.zeros(rows, length, dtype=torch.bool)
        """Places whose keys and values can no longer change."""
        self._kept: list[Buffers] = [{} for _ in model.layers]

    def hidden(self, ids: Tensor, rule: AttentionRule, wanted: Tensor) -> Tensor:
        """See `Reader`; computes `wanted` and whatever they read that is not kept yet."""
        self.final = self.final.to(ids.device)
        reads = rule.mask()[:, 0]
        needed = wanted | (reads & wanted[:, :, None]).any(dim=1)
        computed = needed & ~self.final | wanted
        active = wanted.any(dim=1).nonzero()[:, 0]
        places, real = _packed(computed[active])
        mask = reads[active[:, None], places]
        out = self.at(ids[active].gather(1, places), active, places, mask)
        visible = ids != self.model.space.mask_id
        final = ~(reads & ~visible[:, None, :]).any(dim=2)
        self.final |= computed & final
        asked = wanted[active].gather(1, places) & real
        return out.transpose(0, 1)[asked]

    def at(self, ids: Tensor, rows: Tensor, places: Tensor, mask: Tensor) -> Tensor:
        """Hidden states [n, a, h] of tokens `ids` at `places` (both [a, n]) of `rows` [a].

        `mask` bool [a, n, s]: what each of them reads, of what is kept and of one another.
        """
        cache = _Pass(self._kept, len(self.final), rows, places, mask)
        hidden: Tensor = self.model(ids, places, None, cache=cache)
        return hidden


@dataclass(frozen=True)
class _Pass:
    """New tokens of one pass: their places, what they read, and all that is kept."""

    kept: list[Buffers]
    num_rows: int
    rows: Tensor
    """Rows of the buffers that are computed, int64 [a]."""
    places: Tensor
    """Places of the new tokens in each of them, int64 [a, n]."""
    mask: Tensor
    """Places that each of them reads, bool [a, n, s]."""

    def layer(self, number: int) -> _LayerPass:
        """See `pretrain.model.cache.Cache`."""
        return _LayerPass(self, self.kept[number])


@dataclass(frozen=True)
class _LayerPass:
    """The same for one layer."""

    new: _Pass
    kept: Buffers

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See `pretrain.model.cache.LayerCache`."""
        rows = self.new.rows
        keys, values = (
            self._keep(name, x)[rows].transpose(1, 2) for name, x in (("k", k), ("v", v))
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
        """See `pretrain.model.cache.LayerCache`."""
        buffer, new = self._keep(place, x), self.new
        reach = torch.arange(offsets.start, offsets.stop, device=x.device)
        wanted = new.places[..., None] + reach  # [a, n, k]
        there = wanted.clamp(0, self.new.mask.shape[2] - 1)
        readable = new.mask.gather(2, there) & (wanted == there)
        values = buffer[new.rows[:, None, None], there]  # [a, n, k, h]
        return torch.where(readable[..., None], values, 0.0).permute(2, 1, 0, 3)

    def _keep(self, name: str, x: Tensor) -> Tensor:
        """Write x [n, a, ...] into its buffer [rows, s, ...]; returns the whole buffer."""
        if name not in self.kept:
            shape = (self.new.num_rows, self.new.mask.shape[2], *x.shape[2:])
            self.kept[name] = x.new_zeros(shape)
        buffer = self.kept[name]
        buffer[self.new.rows[:, None], self.new.places] = x.transpose(0, 1)
        return buffer


def reader(model: Transformer, rows: int, length: int, cache: bool) -> Reader:
    """The reader that a sampler of `rows` sequences asks, with or without a cache."""
    return Cached(model, rows, length) if cache else Recompute(model)


def _packed(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Places of True in `chosen` [a, s], ascending, as [a, n]; shorter rows repeat their last one.

    The second result says which entries are not such repeats.
    """
    count = chosen.sum(dim=1)
    first = torch.argsort((~chosen).int(), dim=1, stable=True)
    column = torch.arange(int(count.max()), device=chosen.device).expand(len(chosen), -1)
    real = column < count[:, None]
    return first.gather(1, torch.minimum(column, count[:, None] - 1)), real
