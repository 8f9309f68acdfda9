"""Parts of a transformer layer on megatron-core's tensor-parallel linear layers.

Activations are [s, b, h], sequence first, as megatron-core's sequence parallelism requires. Slices
of a weight concatenate to the same matrix for any tensor-parallel size: query, key and value rows
are grouped by key/value head, and gate and up rows of SwiGLU alternate.

Letters in shapes: s positions, b sequences, h hidden size, g key/value heads (groups) of this rank,
m query heads of a group, d head size, f width of the MLP on this rank.
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
    """Leave `weight` as it is: `pretrain.model.initialize` fills it, by name, in every layout."""
    return weight


def column_linear(topology: Topology, inputs: int, outputs: int) -> ColumnParallelLinear:
    """Linear layer without bias whose outputs are split over tensor-parallel ranks."""
    return ColumnParallelLinear(
        inputs,
        outputs,
        config=parallel_config(topology),
        init_method=no_init,
        bias=False,
        gather_output=False,
    )


def row_linear(topology: Topology, inputs: int, outputs: int) -> RowParallelLinear:
    """Linear layer without bias whose inputs are split over tensor-parallel ranks."""
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
    """Apply a linear layer without bias to x, with its weight or the `weight` given.

    megatron-core's layers issue a warning, which would break a compiled graph; on one rank they are
    a matrix product.
    """
    if torch.compiler.is_compiling() and linear.config.tensor_model_parallel_size == 1:
        return F.linear(x, weight.get("weight", linear.weight))
    out: Tensor = linear(x, **weight)[0]
    return out


class RMSNorm(nn.Module):
    """Root-mean-square norm (arXiv 1910.07467) with a replicated weight.

    With `partial` each tensor-parallel rank applies the weight to a part of the activations only
    (its heads, or a slice of the sequence). The weight's gradient is then summed over these ranks;
    otherwise the replicas would diverge without an error.
    """

    def __init__(self, size: int, eps: float, topology: Topology, partial: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps
        self.topology, self.partial = topology, partial

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x over its last dimension."""
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
        """Attend from and to x [s, b, h]; returns [s, b, h]. Without a key nothing is dropped.

        Who attends to whom is said by the `plan` of the whole batch, or by a `cache`.
        """
        # One product gives queries, keys and values: [s, b, h] -> [s, b, g (m + 2) d]. For each
        # group of this rank they are m query heads, one key head and one value head.
        qkv = _project(self.qkv, x)
        s, b = qkv.shape[:2]
        m = self.heads_per_group
        qkv = qkv.view(s, b, self.groups, m + 2, self.head_size)
        # Views of v [s, b, g, 1, d] and of queries and keys, together [s, b, g, m + 1, d], or
        # apart if they have norms. They are splits, not slices, because the gradient of a slice is
        # a zero-filled copy of the whole.
        *parts, v = qkv.split((m + 1, 1) if self.q_norm is None else (m, 1, 1), dim=3)
        # Norm queries and keys if configured, then rotate them by their positions.
        qk = self._positioned(phases, *parts)  # [s, b, g, m + 1, d]
        q, k = qk.split((m, 1), dim=3)
        q = q.flatten(2, 3)  # [s, b, g m, d]; a copy where a group has several query heads
        # The attention kernel saves q and k; a recomputing layer keeps `parts` instead.
        with (
            self.keep.instead_of(qk, self._positioned, phases, *parts),
            self.keep.instead_of(q, self._queries, phases, *parts),
        ):
            # k and v are [s, b, g, d]; the result is [s, b, g m, d].
            y = self._attend(q, k.squeeze(3), v.squeeze(3), plan, key, cache)
        # Concatenate the heads of this rank, [s, b, g m d], and project them to [s, b, h]. The
        # product sums over tensor-parallel ranks.
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
        """Attention of q [s, b, heads, d] over k, v [s, b, g, d] -> [s, b, heads, d]."""
        if cache is not None:
            return cache.attend(q, k, v)
        if key is None or self.dropout == 0.0:
            return self.attend(q, k, v, plan)
        with seeded(q.device, key.of(f"attention weights/{key.heads}")):
            return self.attend(q, k, v, plan, self.dropout)

    def _positioned(self, phases: tuple[Tensor, Tensor], *parts: Tensor) -> Tensor:
        """Rotated queries and key of each group, normed if configured, [s, b, g, m + 1, d].

        `parts` are both in one tensor, or queries and keys in two if they have norms.
        """
        if self.q_norm is None or self.k_norm is None:
            return rotate(parts[0], *phases)
        return rotate(torch.cat((self.q_norm(parts[0]), self.k_norm(parts[1])), dim=3), *phases)

    def _queries(self, phases: tuple[Tensor, Tensor], *parts: Tensor) -> Tensor:
        """Queries of `_positioned`, [s, b, heads, d]."""
        return self._positioned(phases, *parts)[:, :, :, :-1].flatten(2, 3)


def _join_heads(y: Tensor) -> Tensor:
    """Concatenate heads: [s, b, heads, d] -> [s, b, heads * d], contiguous."""
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
        """Apply the MLP to x [s, b, h]; returns [s, b, h]."""
        # To [s, b, 2 f], gates before the rest, or without a gate to [s, b, f].
        if self.gated:
            # Gate and up rows alternate in the weight. Sorting its rows costs less than reading
            # every activation with a stride.
            weight = self._gates_first()
            with self.keep.instead_of(weight, self._gates_first):
                y = _project(self.up, x, weight=weight)
        else:
            y = _project(self.up, x)
        # Activation [s, b, f], then back to [s, b, h]; the product sums over tensor-parallel ranks.
        z = self.activation(y)
        with self.keep.instead_of(z, self.activation, y):
            out = _project(self.down, z)
        return out

    def _gates_first(self) -> Tensor:
        """Weight of `up` [2 f, h] with all rows of gates before all others."""
        return self.up.weight.unflatten(0, (-1, 2)).transpose(0, 1).flatten(0, 1)


def _gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "swiglu": swiglu,
    "squared_relu": squared_relu,
    "gelu": _gelu,
}
