"""The interface by which a pass reads what earlier passes have computed.

A sampler computes only the tokens that are new. Everything that such a token reads from other
places of its sequence then comes from a cache, which the sampler implements
(`pretrain.sampling.cache`) and hands to the transformer as an argument. Training has none.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class LayerCache(Protocol):
    """Memory of one layer during one pass; a tokens are new in each of n places."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of the new q [n, a, heads, d] over the keys and values that they read.

        The new k, v [n, a, groups, d] are kept first, so that they are among them.
        """
        ...

    def neighbours(self, place: str, x: Tensor, offsets: range) -> Tensor:
        """Inputs of a short convolution at all offsets from the new tokens, [k, n, a, h].

        The new inputs x [n, a, h] are kept first, under the name `place`; 0 stands where a token
        may not read its neighbour.
        """
        ...


class Cache(Protocol):
    """Memory of all layers during one pass, which also knows who reads whom."""

    def layer(self, number: int) -> LayerCache:
        """The part of layer `number`, counted over the whole model."""
        ...
