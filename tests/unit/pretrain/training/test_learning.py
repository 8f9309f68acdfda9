"""Objectives learn what can be learned and nothing else, on a few sequences of real text."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

from pretrain.batch import TrainBatch
from pretrain.config.objectives import objectives
from pretrain.config.optimizers import AdamWConfig
from pretrain.config.run import ModelConfig
from pretrain.noise.key import NoiseKey
from pretrain.training.parameter_groups import parameter_groups


@dataclass(frozen=True)
class Lesson:
    """An objective, how long it trains, and the share of the unigram entropy to get below."""

    objective: str
    steps: int
    share: float
    fields: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    rows: tuple[int, int] = (8, 24)
    """Sequences, and tokens of each."""

    def __str__(self) -> str:
        return f"{self.objective}, {self.rows[0]} sequences"


UNIFORM = {"fields": {"loss": "simple"}, "model": {"time_conditioning": True}}
HYBRID = {"fields": {"noise": "hybrid", "loss": "dynamic"}}
BLOCK = {"fields": {"block_size": 8}}
ESOTERIC = {"fields": {"alpha0": 0.5}}
MEMORISED = [Lesson("autoregressive", 60, 0.25), Lesson("masked", 200, 0.6)]
FAMILIES = [
    Lesson("uniform", 150, 0.95, **UNIFORM),
    Lesson("interpolating", 150, 0.92, **HYBRID),
    Lesson("block", 75, 0.6, **BLOCK),
    Lesson("esoteric", 75, 0.8, **ESOTERIC),
    Lesson("gaussian", 100, 1.1),  # starts far above, because it has to find embeddings first
]
"""Families that read their context through noise leave the unigram entropy later: their gradients
are noisier (benchmarks/gradient_noise.py)."""
TWENTY = (20, 48)
LONGER_MEMORISED = [
    Lesson("autoregressive", 150, 0.25, rows=TWENTY),
    Lesson("masked", 600, 0.25, rows=TWENTY),
]
LONGER_FAMILIES = [
    Lesson("uniform", 300, 0.7, **UNIFORM, rows=TWENTY),
    Lesson("interpolating", 300, 0.75, **HYBRID, rows=TWENTY),
    Lesson("block", 150, 0.3, **BLOCK, rows=TWENTY),
    Lesson("esoteric", 150, 0.6, **ESOTERIC, rows=TWENTY),
    Lesson("gaussian", 300, 0.975, rows=TWENTY),
]
"""Further below the entropy, on more text."""


def with_longer(lessons, longer):
    """Parameters of a test: short lessons, and in the slow suite longer ones."""
    return [*lessons, *(pytest.param(lesson, marks=pytest.mark.slow) for lesson in longer)]


def setup(topology, pool, lesson):
    """A small module, the clean batch of its sequences, and their unigram entropy in nats."""
    from data_pipeline.shards.pool import TokenPool
    from data_pipeline.stream.budget import Budget
    from data_pipeline.stream.stream import TokenStream
    from data_pipeline.tokenizer import load_tokenizer
    from pretrain.data import clean_batch, token_space
    from pretrain.model.initialize import initialize
    from pretrain.model.transformer import Transformer
    from pretrain.module import ObjectiveModule
    from pretrain.objectives import build_objective

    shape = ModelConfig(
        num_layers=2, hidden_size=64, num_attention_heads=4, init_std=0.05, **lesson.model
    )
    space = token_space(load_tokenizer(pool / "tokenizer.model"), shape)
    model = Transformer(shape, space, topology)
    initialize(model, seed=0)
    sequences, length = lesson.rows
    config = objectives.make(lesson.objective, time_window=sequences, **lesson.fields)
    module = ObjectiveModule(model, build_objective(config, space))
    tokens = TokenPool(pool / "train" / "manifest.json")
    stream = TokenStream(tokens, Budget(sequences * length, length, 10**6), seed=0, epochs=1)
    clean = clean_batch(stream.read(np.arange(sequences)))
    share = torch.bincount(clean.tokens.flatten()).double() / clean.tokens.numel()
    entropy = float(-(share[share > 0] * share[share > 0].log()).sum())
    return module, clean, entropy


def learn(module, clean, steps, change=lambda batch, step: batch):
    """AdamW on the same sequences, new noise at every step; the training losses."""
    groups = parameter_groups(module, AdamWConfig(weight_decay=0.0))
    rates = [{**group, "lr": 3e-3 * group.get("lr_scale", 1.0)} for group in groups]
    optimizer = torch.optim.AdamW(rates)
    losses = []
    for step in range(steps):
        noise = NoiseKey(0, clean.position + step * len(clean.tokens))
        batch = change(module.objective.corrupt(clean, noise), step)
        loss = module(batch) / clean.tokens.numel()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def bound(module, clean):
    """Exact bound of the sequences in nats per token, averaged over draws."""
    draws = [NoiseKey(99, clean.position + i * len(clean.tokens)) for i in range(8)]
    with torch.no_grad():
        totals = [module(module.objective.bound_batch(clean, d), exact=True).sum() for d in draws]
    return float(torch.stack(totals).mean()) / clean.tokens.numel()


@pytest.mark.parametrize("lesson", with_longer(MEMORISED, LONGER_MEMORISED), ids=str)
def test_sequences_are_memorised_far_below_their_entropy(topology, pool, lesson):
    module, clean, entropy = setup(topology, pool, lesson)
    assert entropy > 4
    assert bound(module, clean) > entropy
    losses = learn(module, clean, lesson.steps)
    assert np.mean(losses[-20:]) < lesson.share * entropy
    assert bound(module, clean) < lesson.share * entropy


@pytest.mark.parametrize("lesson", with_longer(FAMILIES, LONGER_FAMILIES), ids=str)
def test_every_family_learns_what_its_bound_measures(topology, pool, lesson):
    """Surrogates too: what falls is the exact bound, whatever is trained."""
    module, clean, entropy = setup(topology, pool, lesson)
    assert bound(module, clean) > 1.3 * entropy
    learn(module, clean, lesson.steps)
    assert bound(module, clean) < lesson.share * entropy


@pytest.mark.parametrize("lesson", with_longer(MEMORISED, LONGER_MEMORISED), ids=str)
def test_targets_reshuffled_at_every_step_cannot_be_learned(topology, pool, lesson):
    """Whatever falls below the unigram entropy here would come through a leak of the targets."""

    def reshuffle(batch: TrainBatch, step: int) -> TrainBatch:
        order = torch.randperm(len(batch.targets), generator=torch.Generator().manual_seed(step))
        return TrainBatch(**{**batch.__dict__, "targets": batch.targets[order]})

    module, clean, entropy = setup(topology, pool, lesson)
    losses = learn(module, clean, max(60, lesson.steps // 2), reshuffle)
    assert np.mean(losses[-40:]) > 0.95 * entropy
