"""A small module of every family on a few sequences, for the tests beside this file."""

from __future__ import annotations

import torch

from pretrain.batch import CleanBatch
from pretrain.config.objectives import objectives
from pretrain.config.run import ModelConfig
from pretrain.vocabulary import TokenSpace

SPACE = TokenSpace(100, 128, 0, 4, 5, (0, 1, 2, 3, 4))
LENGTH, BATCH = 24, 3
FAMILIES = {
    "autoregressive": {"name": "autoregressive"},
    "masked": {"name": "masked"},
    "uniform": {"name": "uniform"},
    "uniform, simple": {"name": "uniform", "loss": "simple"},
    "interpolating": {"name": "interpolating"},
    "block": {"name": "block", "block_size": 8},
    "esoteric": {"name": "esoteric", "alpha0": 0.5},
}


def clean_batch():
    g = torch.Generator().manual_seed(1)
    tokens = torch.randint(5, 100, (BATCH, LENGTH), generator=g)
    valid = torch.ones(BATCH, LENGTH, dtype=torch.bool)
    valid[1, -5:] = False
    return CleanBatch(
        tokens=torch.where(valid, tokens, 0),
        position=torch.arange(BATCH),
        segment=torch.zeros(BATCH, LENGTH, dtype=torch.int32),
        valid=valid,
        all_valid=False,
    )


def build(topology, objective, dtype=torch.float32, loss_chunk=None, **changes):
    from pretrain.model.initialize import initialize
    from pretrain.model.transformer import Transformer
    from pretrain.module import ObjectiveModule
    from pretrain.objectives import build_objective

    shape = {
        "num_layers": 1,
        "hidden_size": 16,
        "num_attention_heads": 2,
        "init_std": 0.3,
        "ffn_hidden_size": 32,
    }
    config = ModelConfig(**{**shape, **changes})
    family = build_objective(objectives.make(time_window=BATCH, **objective), SPACE)
    causal = family.config.convolution == "causal"
    model = Transformer(config, SPACE, topology, causal=causal).to(dtype)
    initialize(model, seed=3)
    return ObjectiveModule(model, family, loss_chunk=loss_chunk)
