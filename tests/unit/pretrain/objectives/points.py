"""Small languages whose tokens are points, and a stand-in for the transformer that knows them.

What it answers is log p(x^l | the other noisy tokens); with the output prior of Gaussian diffusion
that is the exact posterior.
"""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import torch
from torch import nn

from pretrain.batch import CleanBatch
from pretrain.config.objectives import objectives
from pretrain.config.run import ModelConfig
from pretrain.noise.learned import Level
from pretrain.objectives import build_objective
from pretrain.vocabulary import TokenSpace

FIRST = 2


def space(k: int) -> TokenSpace:
    """k possible targets with ids 2, 3, ... (the first is <doc>), one padding column behind."""
    return TokenSpace(FIRST + k, FIRST + k + 1, 0, 1, FIRST, (0, 1))


def clean_batch(x, position=None, valid=None) -> CleanBatch:
    tokens = torch.as_tensor(x, dtype=torch.int64) + FIRST
    valid = torch.ones_like(tokens, dtype=torch.bool) if valid is None else valid
    return CleanBatch(
        tokens=torch.where(valid, tokens, 0),
        position=torch.arange(len(tokens)) if position is None else position,
        segment=torch.zeros_like(tokens, dtype=torch.int32),
        valid=valid,
        all_valid=bool(valid.all()),
    )


class Answers(nn.Module):
    """In the place of the transformer: `answer(z [b, s, d], level) -> log p [b, s, k]`."""

    def __init__(self, topology, k, size, answer):

        super().__init__()
        self.config = SimpleNamespace(hidden_size=size, time_conditioning=False)
        self.space, self.topology = space(k), topology
        self.k, self.answer = k, answer
        self.gamma = torch.empty(0)

    def forward(self, ids, positions, rule, carried, dropout_seed=None):
        self.shape = ids.shape
        return carried[0]

    def score(self, rows, score):
        return score(self.outputs, rows, torch.empty(FIRST + self.k + 1, 1))

    def outputs(self, rows, weight):
        from pretrain.model.vocab import VocabChunk

        level = Level(self.gamma[:, None, None])
        scale = (level.alpha.square() / rows.shape[1] + level.sigma.square()).sqrt()
        logits = torch.full((*self.shape, FIRST + self.k + 1), -torch.inf, dtype=torch.float64)
        logits[..., FIRST : FIRST + self.k] = self.answer(rows.view(*self.shape, -1) * scale, level)
        return VocabChunk(logits.flatten(0, 1), self.topology)


def language(topology, embeddings, answer, **fields):
    """Objective, its auxiliary network with these unit embeddings [k, d], the stand-in model."""
    embeddings = torch.as_tensor(embeddings, dtype=torch.float64)
    k, size = embeddings.shape
    config = objectives.make(
        name="gaussian", time_window=64, embedding_size=size, **{"self_conditioning": 0.0} | fields
    )
    family = build_objective(config, space(k))
    model = Answers(topology, k, size, answer)
    network = family.auxiliary_network(model, seed=3).double()
    with torch.no_grad():
        network.embedding.weight[FIRST : FIRST + k] = 1.7 * embeddings  # rows are normalised
        network.enter.weight.copy_(torch.eye(size))
        for name in ("steepness", "offset", "height"):  # enough of them to bend, few enough to wait
            setattr(
                network.schedule, name, nn.Parameter(getattr(network.schedule, name)[:8].clone())
            )
    return family, network, model


def real_module(topology, **fields):
    from pretrain.model.initialize import initialize
    from pretrain.model.transformer import Transformer
    from pretrain.module import ObjectiveModule

    shape = ModelConfig(
        num_layers=1, hidden_size=16, num_attention_heads=2, vocab_multiple=8, init_std=0.3
    )
    inner = TokenSpace(7, 8, 0, 1, FIRST, (0, 1))
    model = Transformer(shape, inner, topology)
    initialize(model, seed=1)
    config = objectives.make(name="gaussian", time_window=8, **fields)
    module = ObjectiveModule(model, build_objective(config, inner), seed=1)
    module.own.remember.weight.data.normal_(generator=torch.Generator().manual_seed(2))
    return module


CIRCLE = np.stack([(math.cos(a), math.sin(a)) for a in 2 * math.pi * np.arange(5) / 5])
SKEW = np.array([0.45, 0.25, 0.15, 0.1, 0.05])
