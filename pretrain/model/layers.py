"""Parts of a transformer layer on megatron-core's tensor-parallel linear layers.

Everything is [s, b, h] (sequence first, as megatron-core's sequence parallelism wants it). Sharded
weights stay concatenation-safe: query, key and value rows are grouped per key/value head, gate and
up rows of SwiGLU interleave, so that shards of any tensor-parallel size concatenate to the same
matrix.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from torch import Tensor, nn

from parallel.context import spread_attention
from parallel.layers import parallel_config, sum_gradient
from parallel.layout.topology import Topology
from pretrain.config.run import ModelConfig
from pretrain.model.attention import AttentionPlan, attend
from pretrain.model.cache import LayerCache
from pretrain.model.dropout import DropoutKey, seeded
from pretrain.model.kernels import rms_norm, rotate, squared_relu, swiglu
from pretrain.model.recompute import Keep


def no_init(weight: Tensor) -> Tensor:
    """Weights are filled in by `pretrain.model.initialize`, by name, in every layout alike."""
    return weight


def column_linear(topology: Topology, inputs: int, outputs: int) -> ColumnParallelLinear:
    """Linear layer whose outputs are sharded; no bias."""
    return ColumnParallelLinear(
        inputs,
        outputs,
        config=parallel_config(topology),
        init_method=no_init,
        bias=False,
        gather_output=False,
    )


def row_linear(topology: Topology, inputs: int, outputs: int) -> RowParallelLinear:
    """Linear layer whose inputs are sharded; no bias."""
    return RowParallelLinear(
        inputs,
        outputs,
        config=parallel_config(topology),
        init_method=no_init,
        bias=False,
        input_is_parallel=True,
        skip_bias_add=False,
    )


def _project(
    linear: ColumnParallelLinear | RowParallelLinear, x: Tensor, **weight: Tensor
) -> Tensor:
    """x by a bias-free linear layer (`weight` in place of its own).

    megatron-core's layers warn, which ends a compiled graph; on one rank they are a product.
    """
    if torch.compiler.is_compiling() and linear.config.tensor_model_parallel_size == 1:
        return F.linear(x, weight.get("weight", linear.weight))
    out: Tensor = linear(x, **weight)[0]
    return out


class RMSNorm(nn.Module):
    """Root-mean-square norm (arXiv 1910.07467) with a replicated weight.

    `partial` says that each tensor-parallel rank sees only part of what the weight touches (heads,
    or a slice of the sequence), so that its gradient must be summed over those ranks; without this
    the replicas drift apart without any error.
    """

    def __init__(self, size: int, eps: float, topology: Topology, partial: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps
        self.topology, self.partial = topology, partial

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension."""
        weight = sum_gradient(self.weight, self.topology) if self.partial else self.weight
        return rms_norm(x, weight, self.eps)


def rotary_phases(positions: Tensor, head_size: int, base: float) -> tuple[Tensor, Tensor]:
    """cos and sin of rotary embedding (arXiv 2104.09864), float32 [s, b or 1, 1, 1, d/2].

    positions int64 [b or 1, s].
    """
    exponent = torch.arange(0, head_size, 2, device=positions.device, dtype=torch.float32)
    frequency = base ** (-exponent / head_size)
    phase = positions.t().float()[..., None] * frequency
    return phase.cos()[:, :, None, None], phase.sin()[:, :, None, None]


class Attention(nn.Module):
    """Grouped-query self-attention with rotary positions."""

    def __init__(self, config: ModelConfig, topology: Topology, keep: Keep) -> None:
        super().__init__()
        self.keep = keep
        tp = topology.tensor_parallel_size
        self.head_size = config.head_size
        self.dropout = config.attention_dropout
        self.attend = spread_attention(attend, topology)
        self.groups = config.query_groups // tp
        self.heads_per_group = config.num_attention_heads // config.query_groups
        rows = config.query_groups * (self.heads_per_group + 2) * self.head_size
        self.qkv = column_linear(topology, config.hidden_size, rows)
        width = config.num_attention_heads * self.head_size
        self.out = row_linear(topology, width, config.hidden_size)
        norms = [
            RMSNorm(self.head_size, config.norm_eps, topology, partial=True)
            if config.qk_norm
            else None
            for _ in range(2)
        ]
        self.q_norm, self.k_norm = norms

    def forward(
        self,
        x: Tensor,
        plan: AttentionPlan | None,
        phases: tuple[Tensor, Tensor],
        key: DropoutKey | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """[s, b, h] -> [s, b, h]; without a key nothing is dropped.

        Either a `plan` of the whole batch says who reads whom, or a `cache` does.
        """
        qkv = _project(self.qkv, x)
        s, b = qkv.shape[:2]
        qkv = qkv.view(s, b, self.groups, self.heads_per_group + 2, self.head_size)
        m = self.heads_per_group
        # Splits, not slices: the gradient of a slice is a zero-filled copy of the whole.
        *parts, v = qkv.split((m + 1, 1) if self.q_norm is None else (m, 1, 1), dim=3)
        qk = self._positioned(phases, *parts)
        q, k = qk.split((m, 1), dim=3)
        q = q.flatten(2, 3)  # a copy where a group has several queries
        with (
            self.keep.instead_of(qk, self._positioned, phases, *parts),
            self.keep.instead_of(q, self._queries, phases, *parts),
        ):
            y = self._attend(q, k.squeeze(3), v.squeeze(3), plan, key, cache)
        joined = _join_heads(y)
        with self.keep.instead_of(joined, _join_heads, y):
            out = _project(self.out, joined)
        return out

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        plan: AttentionPlan | None,
        key: DropoutKey | None,
        cache: LayerCache | None,
    ) -> Tensor:
        if cache is not None:
            return cache.attend(q, k, v)
        if key is None or self.dropout == 0.0:
            return self.attend(q, k, v, plan)
        with seeded(q.device, key.of(f"attention weights/{key.heads}")):
            return self.attend(q, k, v, plan, self.dropout)

    def _positioned(self, phases: tuple[Tensor, Tensor], *parts: Tensor) -> Tensor:
        """Queries and key of each group, normed if they are to be and rotated, [s, b, g, m + 1, d].

        `parts` is both together, or queries and key apart if they have norms.
        """
        if self.q_norm is None or self.k_norm is None:
            return rotate(parts[0], *phases)
        return rotate(torch.cat((self.q_norm(parts[0]), self.k_norm(parts[1])), dim=3), *phases)

    def _queries(self, phases: tuple[Tensor, Tensor], *parts: Tensor) -> Tensor:
        """The queries among `_positioned`, [s, b, heads, d]."""
        return self._positioned(phases, *parts)[:, :, :, :-1].flatten(2, 3)


def _join_heads(y: Tensor) -> Tensor:
    """[s, b, heads, d] -> [s, b, heads * d], contiguous."""
    return y.reshape(*y.shape[:2], -1)


class MLP(nn.Module):
    """Feed-forward part: SwiGLU, squared ReLU or GELU."""

    def __init__(self, config: ModelConfig, topology: Topology, keep: Keep) -> None:
        super().__init__()
        self.keep = keep
        self.gated = config.activation == "swiglu"
        self.activation = _ACTIVATIONS[config.activation]
        width = (2 if self.gated else 1) * config.ffn_size
        self.up = column_linear(topology, config.hidden_size, width)
        self.down = row_linear(topology, config.ffn_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """[s, b, h] -> [s, b, h]."""
        if self.gated:
            # Gate and up rows interleave in storage; apart, they are read at full speed. Moving the
            # weight costs less than reading every activation with a stride.
            apart = self._weight_apart()
            with self.keep.instead_of(apart, self._weight_apart):
                y = _project(self.up, x, weight=apart)
        else:
            y = _project(self.up, x)
        z = self.activation(y)
        with self.keep.instead_of(z, self.activation, y):
            out = _project(self.down, z)
        return out

    def _weight_apart(self) -> Tensor:
        """Weight of `up` with all rows of gates before all others."""
        return self.up.weight.unflatten(0, (-1, 2)).transpose(0, 1).flatten(0, 1)


def _gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "swiglu": swiglu,
    "squared_relu": squared_relu,
    "gelu": _gelu,
}
