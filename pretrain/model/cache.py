"""Interface of a key/value cache, by which a pass uses results of earlier passes.

A sampler computes only the tokens that are new. Whatever these tokens need of other places of their
sequences comes from a cache. The sampler implements it (`pretrain.sampling.cache`) and passes it to
the transformer as an argument; training has none.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class LayerCache(Protocol):
    """Cache of one layer in one pass, for n new tokens in each of a rows."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of the new q [n, a, heads, d] over the keys and values of their sequences.

        The new k, v [n, a, groups, d] are stored first, so that they are among them.
        """
        ...

    def neighbours(self, place: str, x: Tensor, offsets: range) -> Tensor:
        """Inputs of a short convolution at all offsets from the new tokens, [k, n, a, h].

        The new inputs x [n, a, h] are stored first, under the name `place`. The result is 0 where
        a token may not attend to its neighbour.
        """
        ...


class Cache(Protocol):
    """Cache of all layers in one pass; it also says which tokens attend to which."""

    def layer(self, number: int) -> LayerCache:
        """Part of layer `number`, counted over the whole model."""
        ...
