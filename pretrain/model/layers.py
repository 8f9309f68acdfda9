"""Parts of a transformer layer on megatron-core's tensor-parallel linear layers.

Everything is [s, b, h] (sequence first, as megatron-core's sequence parallelism wants it). Sharded
weights stay concatenation-safe: query, key and value rows are grouped per key/value head, gate and
up rows of SwiGLU interleave, so that shards of any tensor-parallel size concatenate to the same
matrix.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from torch import Tensor, nn

from parallel.context import spread_attention
from parallel.layers import sum_gradient
from pretrain.config import ModelConfig
from pretrain.model.attention import AttentionPlan, attend
from pretrain.model.kernels import rms_norm, rotate, swiglu


def _no_init(weight: Tensor) -> Tensor:
    """Weights are filled in by `pretrain.model.initialize`, by name, in every layout alike."""
    return weight


def column_linear(parallel: ModelParallelConfig, inputs: int, outputs: int) -> ColumnParallelLinear:
    """Linear layer whose outputs are sharded; no bias."""
    return ColumnParallelLinear(
        inputs, outputs, config=parallel, init_method=_no_init, bias=False, gather_output=False
    )


def row_linear(parallel: ModelParallelConfig, inputs: int, outputs: int) -> RowParallelLinear:
    """Linear layer whose inputs are sharded; no bias."""
    return RowParallelLinear(
        inputs,
        outputs,
        config=parallel,
        init_method=_no_init,
        bias=False,
        input_is_parallel=True,
        skip_bias_add=False,
    )


class RMSNorm(nn.Module):
    """Root-mean-square norm (arXiv 1910.07467) with a replicated weight.

    `partial` says that each tensor-parallel rank sees only part of what the weight touches (heads,
    or a slice of the sequence), so that its gradient must be summed over those ranks; without this
    the replicas drift apart without any error.
    """

    def __init__(self, size: int, eps: float, partial: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps
        self.partial = partial

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension."""
        weight = sum_gradient(self.weight) if self.partial else self.weight
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

    def __init__(self, config: ModelConfig, parallel: ModelParallelConfig) -> None:
        super().__init__()
        tp = parallel.tensor_model_parallel_size
        self.head_size = config.head_size
        self.attend = spread_attention(attend)
        self.groups = config.query_groups // tp
        self.heads_per_group = config.num_attention_heads // config.query_groups
        rows = config.query_groups * (self.heads_per_group + 2) * self.head_size
        self.qkv = column_linear(parallel, config.hidden_size, rows)
        width = config.num_attention_heads * self.head_size
        self.out = row_linear(parallel, width, config.hidden_size)
        norms = [
            RMSNorm(self.head_size, config.norm_eps, partial=True) if config.qk_norm else None
            for _ in range(2)
        ]
        self.q_norm, self.k_norm = norms

    def forward(self, x: Tensor, plan: AttentionPlan, phases: tuple[Tensor, Tensor]) -> Tensor:
        """[s, b, h] -> [s, b, h]."""
        qkv, _ = self.qkv(x)
        s, b = qkv.shape[:2]
        qkv = qkv.view(s, b, self.groups, self.heads_per_group + 2, self.head_size)
        m = self.heads_per_group
        # Splits, not slices: the gradient of a slice is a zero-filled copy of the whole.
        if self.q_norm is not None and self.k_norm is not None:
            q, k, v = qkv.split((m, 1, 1), dim=3)
            qk = torch.cat((self.q_norm(q), self.k_norm(k)), dim=3)
        else:
            qk, v = qkv.split((m + 1, 1), dim=3)
        q, k = rotate(qk, *phases).split((m, 1), dim=3)
        y = self.attend(q.flatten(2, 3), k.squeeze(3), v.squeeze(3), plan)
        out: Tensor = self.out(y.reshape(s, b, -1))[0]
        return out


class MLP(nn.Module):
    """Feed-forward part: SwiGLU, squared ReLU or GELU."""

    def __init__(self, config: ModelConfig, parallel: ModelParallelConfig) -> None:
        super().__init__()
        self.activation = config.activation
        gates = 2 if config.activation == "swiglu" else 1
        self.up = column_linear(parallel, config.hidden_size, gates * config.ffn_size)
        self.down = row_linear(parallel, config.ffn_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """[s, b, h] -> [s, b, h]."""
        if self.activation == "swiglu":
            # Gate and up rows interleave in storage; apart, they are read at full speed. Moving the
            # weight costs less than reading every activation with a stride.
            apart = self.up.weight.unflatten(0, (-1, 2)).transpose(0, 1).flatten(0, 1)
            y = swiglu(self.up(x, weight=apart)[0])
            out: Tensor = self.down(y)[0]
            return out
        y = self.up(x)[0]
        if self.activation == "squared_relu":
            y = F.relu(y).square()
        else:
            y = F.gelu(y, approximate="tanh")
        return self.down(y)[0]
