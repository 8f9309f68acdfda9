"""Keys and values of tokens that cannot change any more, so that a pass computes only what is new.

Exact for families that read in an order (autoregressive, block, esoteric): what a token reads is
then fixed once everything before it is. A cached pass gives the same hidden states as a pass over
the whole sequence, up to rounding. Masked, uniform and interpolating models read in both directions
and have nothing that stays.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.batch import AttentionRule
from pretrain.model.transformer import Transformer


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
    """Keeps keys and values of every layer, by row and place; a context manager.

    While it is open, core attention of the model's layers reads from the cache: training or
    evaluating the same model has to wait until it is closed.
    """

    def __init__(self, model: Transformer, rows: int, length: int) -> None:
        self.model, self.length = model, length
        self.final = torch.zeros(rows, length, dtype=torch.bool)
        """Places whose keys and values can no longer change."""
        self._kept: list[list[Tensor]] = [[] for _ in model.layers]
        self._rows = self._places = self._mask = torch.empty(0)
        self._attentions: list[Any] = [layer.attention for layer in model.layers]
        self._usual = [attention.attend for attention in self._attentions]

    def __enter__(self) -> Cached:
        for number, attention in enumerate(self._attentions):
            attention.attend = _LayerAttention(self, number)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for attention, usual in zip(self._attentions, self._usual, strict=True):
            attention.attend = usual

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
        settled = ~(reads & ~visible[:, None, :]).any(dim=2)
        self.final |= computed & settled
        asked = wanted[active].gather(1, places) & real
        return out.transpose(0, 1)[asked]

    def at(self, ids: Tensor, rows: Tensor, places: Tensor, mask: Tensor) -> Tensor:
        """Hidden states [n, a, h] of tokens `ids` at `places` (both [a, n]) of `rows` [a].

        `mask` bool [a, n, s]: what each of them reads, of what is kept and of one another.
        """
        self._rows, self._places, self._mask = rows, places, mask[:, None]
        hidden: Tensor = self.model(ids, places, AttentionRule("causal"))
        return hidden

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of q [n, a, heads, d] over the kept keys and values and the new k, v."""
        kept = self._kept[layer]
        if not kept:
            shape = (len(self.final), self.length, *k.shape[2:])
            kept += [k.new_zeros(shape), v.new_zeros(shape)]
        for buffer, new in zip(kept, (k, v), strict=True):
            buffer[self._rows[:, None], self._places] = new.transpose(0, 1)
        keys, values = (buffer[self._rows].transpose(1, 2) for buffer in kept)
        out = F.scaled_dot_product_attention(
            q.permute(1, 2, 0, 3),
            keys,
            values,
            attn_mask=self._mask,
            enable_gqa=q.shape[2] != k.shape[2],
        )
        return out.permute(2, 0, 1, 3)


class _LayerAttention:
    """Stands in for the core attention of one layer."""

    def __init__(self, cache: Cached, layer: int) -> None:
        self.cache, self.layer = cache, layer

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> Tensor:
        return self.cache.attend(self.layer, q, k, v)


def reader(
    model: Transformer, rows: int, length: int, cache: bool
) -> AbstractContextManager[Reader]:
    """What a sampler of `rows` sequences asks, with or without a cache."""
    return Cached(model, rows, length) if cache else nullcontext(Recompute(model))


def _packed(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Places of True in `chosen` [a, s], ascending, as [a, n]; shorter rows repeat their last one.

    The second result says which entries are not such repeats.
    """
    count = chosen.sum(dim=1)
    first = torch.argsort((~chosen).int(), dim=1, stable=True)
    column = torch.arange(int(count.max()), device=chosen.device).expand(len(chosen), -1)
    real = column < count[:, None]
    return first.gather(1, torch.minimum(column, count[:, None] - 1)), real
