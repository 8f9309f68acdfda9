"""CompleteP (arXiv 2505.01618, alpha = 1): multipliers by which a recipe holds at other sizes.

With m = width / base width and l = depth / base depth, a recipe that was tuned at the base size is
used unchanged at the size of the run:

    parameter                              initial std   rate    decay   eps of Adam
    matrices of the layers                 1 / sqrt(m)   1 / m   m       1 / (m l)
    other parameters of the layers         1             1       1       1 / (m l)
    embedding, final norm, head            1             1       1       1 / m
    inputs of a fixed width                1             1       1       1

    residual stream    x + branch(x) / l          logits    h W^T / m

At the base size every multiplier is 1. They are functions of the parameter's canonical name and of
the configuration, so that no layout changes them. Attention keeps its scale 1 / sqrt(head size):
rates transfer between models with the same head size, which have more heads where they are wider.
Free of torch, because the planner needs the groups too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from pretrain.config.model import ModelConfig

_MATRICES = ("attention.qkv.weight", "attention.out.weight", "mlp.up.weight", "mlp.down.weight")
"""Ends of the names of the matrices whose inputs grow with the width."""
_FIXED_INPUTS = ("model.noise_embedding.", "own.embedding.", "own.schedule.")
"""Beginnings of the names of parameters whose gradients do not shrink with the width."""


@dataclass(frozen=True)
class Multipliers:
    """Factors of the settings of the optimizer for one parameter, and of its initial deviation."""

    lr: float = 1.0
    weight_decay: float = 1.0
    eps: float = 1.0
    init: float = 1.0


NONE = Multipliers()


@dataclass(frozen=True)
class Ratios:
    """Size of a model relative to that at which its recipe was tuned."""

    width: float
    depth: float


def ratios(model: ModelConfig) -> Ratios:
    """Ratios of a configuration; 1 and 1 under the standard parametrisation."""
    if model.base_hidden_size is None or model.base_num_layers is None:
        return Ratios(1.0, 1.0)
    return Ratios(
        model.hidden_size / model.base_hidden_size, model.num_layers / model.base_num_layers
    )


def multipliers(name: str, model: ModelConfig) -> Multipliers:
    """Factors for the parameter of this canonical name (`model....` or `own....`)."""
    size = ratios(model)
    if size == Ratios(1.0, 1.0) or name.startswith(_FIXED_INPUTS):
        return NONE
    if not name.startswith("model.layers."):
        return Multipliers(eps=1 / size.width)
    eps = 1 / (size.width * size.depth)
    if not name.endswith(_MATRICES):
        return Multipliers(eps=eps)
    return Multipliers(1 / size.width, size.width, eps, 1 / math.sqrt(size.width))


def branch_multiplier(model: ModelConfig) -> float:
    """Factor of attention and MLP in the residual stream."""
    return 1 / ratios(model).depth


def logit_multiplier(model: ModelConfig) -> float:
    """Factor of the logits."""
    return 1 / ratios(model).width


def residual_depth(model: ModelConfig) -> int:
    """Number of layers that divides the initial weights of projections back into the stream.

    It is that of the base under CompleteP, whose branch multiplier has the rest.
    """
    return model.base_num_layers or model.num_layers
