"""One layer of the transformer: attention and MLP around the residual stream."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from parallel.layout.topology import Topology
from pretrain.config.run import ModelConfig
from pretrain.model.attention import AttentionPlan
from pretrain.model.cache import LayerCache
from pretrain.model.conditioning import Modulation, modulate
from pretrain.model.convolution import ShortConvolution
from pretrain.model.dropout import DropoutKey, dropout
from pretrain.model.layers import MLP, Attention, RMSNorm
from pretrain.model.parametrization import branch_multiplier
from pretrain.model.recompute import Keep


class TransformerLayer(nn.Module):
    """Attention and MLP, each after a norm, a modulation (if noise-conditioned) and a short
    convolution (if configured), added to the residual stream."""

    def __init__(
        self, config: ModelConfig, topology: Topology, keep: Keep, causal: bool = False
    ) -> None:
        """Build the layer; with `causal` its convolutions read earlier tokens only."""
        super().__init__()
        self.keep = keep
        size, eps, partial = config.hidden_size, config.norm_eps, topology.sequence_parallel
        self.attention_norm = RMSNorm(size, eps, topology, partial)
        self.attention = Attention(config, topology, keep)
        self.mlp_norm = RMSNorm(size, eps, topology, partial)
        self.mlp = MLP(config, topology, keep)
        kernel = config.short_convolution
        self.attention_convolution, self.mlp_convolution = (
            ShortConvolution(size, kernel, causal, place) if kernel else None
            for place in ("attention", "mlp")
        )
        self.dropout, self.multiplier = config.dropout, branch_multiplier(config)
        self.modulation = Modulation(6, size, topology) if config.time_conditioning else None

    def forward(
        self,
        x: Tensor,
        plan: AttentionPlan | None,
        phases: tuple[Tensor, Tensor],
        condition: Tensor | None,
        key: DropoutKey | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """Apply the layer to x [s, b, h]; condition [b, c] or None. Without a key nothing is
        dropped."""
        drop = functools.partial(dropout, p=self.dropout, key=key)
        attention = (self.attention, plan, phases, key, cache)
        mixes = self._convolutions(plan, cache)
        if self.modulation is None:
            y = self._normed(x, self.attention_norm, (), mixes[0], *attention)
            x = self._add(x, drop(y, place="attention"))
            y = self._normed(x, self.mlp_norm, (), mixes[1], self.mlp)
            return self._add(x, drop(y, place="mlp"))
        assert condition is not None, "a time-conditioned model needs a noise level"
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition)
        y = self._normed(x, self.attention_norm, (shift1, scale1), mixes[0], *attention)
        x = self._add(x, gate1 * drop(y, place="attention"))
        y = self._normed(x, self.mlp_norm, (shift2, scale2), mixes[1], self.mlp)
        return self._add(x, gate2 * drop(y, place="mlp"))

    def _add(self, x: Tensor, branch: Tensor) -> Tensor:
        """Residual stream after a branch."""
        if self.multiplier == 1:
            return x + branch
        return torch.add(x, branch, alpha=self.multiplier)

    def _convolutions(
        self, plan: AttentionPlan | None, cache: LayerCache | None
    ) -> list[Callable[[Tensor], Tensor] | None]:
        """The two convolutions as functions of their input in this pass; None without."""
        readable = None if plan is None else plan.neighbours
        both = (self.attention_convolution, self.mlp_convolution)
        return [
            None if part is None else functools.partial(part, readable=readable, cache=cache)
            for part in both
        ]

    def _normed(
        self,
        x: Tensor,
        norm: RMSNorm,
        modulation: tuple[Tensor, ...],
        mix: Callable[[Tensor], Tensor] | None,
        part: nn.Module,
        *rest: Any,
    ) -> Tensor:
        """Apply `part` to x [s, b, h], normed, modulated and convolved by `mix`.

        A recomputing layer keeps x only.
        """

        def modulated(x: Tensor, *modulation: Tensor) -> Tensor:
            h = norm(x)
            if modulation:
                with self.keep.instead_of(h, norm, x):
                    h = modulate(h, *modulation)
            return h

        def prepare(x: Tensor, *modulation: Tensor) -> Tensor:
            h = modulated(x, *modulation)
            if mix is not None:
                with self.keep.instead_of(h, modulated, x, *modulation):
                    h = mix(h)
            return h

        h = prepare(x, *modulation)
        with self.keep.instead_of(h, prepare, x, *modulation):
            out: Tensor = part(h, *rest)
        return out
