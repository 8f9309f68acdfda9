"""Initial weights as a function of (seed, canonical name, element), the same in every layout.

Each row of a weight is a keyed draw. A rank fills its slice without the rest of the matrix; tensor
parallelism, pipeline stages and the order of construction change nothing.
"""

from __future__ import annotations

import math

import torch
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from torch import Tensor, nn

from parallel.layers import mark_tensor_parallel
from pretrain.model.convolution import ShortConvolution
from pretrain.model.parametrization import multipliers, residual_depth
from pretrain.model.transformer import Transformer
from pretrain.noise.key import NoiseKey

_ROWS = 4096  # rows drawn at once; bounds the memory of the float64 draws


def keyed_normal(seed: int, name: str, rows: range, columns: slice, width: int) -> Tensor:
    """Standard normals [len(rows), columns]: a part of the whole weight `name` of width `width`."""
    pieces = []
    for start in range(rows.start, rows.stop, _ROWS):
        index = torch.arange(start, min(start + _ROWS, rows.stop))
        draw = NoiseKey(seed, index).normal(f"init/{name}", width)
        pieces.append(draw[:, columns].float())
    return torch.cat(pieces)


@torch.no_grad()
def initialize(model: Transformer, seed: int) -> None:
    """Fill every parameter of `model` and mark slices of larger weights for the engine.

    Matrices are normal with `init_std`; projections back into the residual stream are divided by
    sqrt(2 num_layers) (GPT-2); `pretrain.model.parametrization` has factors of both. Short
    convolutions of k weights have deviation 1 / sqrt(3 k), as torch gives them. Modulations and
    biases are zero, norm weights one.
    """
    rank = model.topology.tp_rank
    std = model.config.init_std
    residual_std = std / math.sqrt(2 * residual_depth(model.config))
    for path, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if not isinstance(weight, nn.Parameter):
            continue
        name = f"{path}.weight"
        scale = multipliers(f"model.{name}", model.config).init
        if isinstance(module, (ColumnParallelLinear, VocabParallelEmbedding)):
            count, width = weight.shape
            rows = range(rank * count, (rank + 1) * count)
            weight.copy_(std * scale * keyed_normal(seed, name, rows, slice(None), width))
            mark_tensor_parallel(weight, 0)
        elif isinstance(module, RowParallelLinear):
            count, local = weight.shape
            columns = slice(rank * local, (rank + 1) * local)
            draw = keyed_normal(seed, name, range(count), columns, module.input_size)
            weight.copy_(residual_std * scale * draw)
            mark_tensor_parallel(weight, 1)
        elif isinstance(module, ShortConvolution):
            kernel, channels = weight.shape
            draw = keyed_normal(seed, name, range(kernel), slice(None), channels)
            weight.copy_(draw / math.sqrt(3 * kernel))
        elif isinstance(module, nn.Linear):
            zero = path.endswith("modulation.linear")  # adaLN starts as the identity
            draw = keyed_normal(seed, name, range(weight.shape[0]), slice(None), weight.shape[1])
            weight.copy_(torch.zeros_like(draw) if zero else std * draw)
            if module.bias is not None:
                module.bias.zero_()
