"""Objectives learn what can be learned and nothing else, on twenty sequences of real text."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pretrain.batch import TrainBatch
from pretrain.config.objectives import objectives
from pretrain.config.run import ModelConfig, OptimizerConfig
from pretrain.noise.key import NoiseKey
from pretrain.training.parameter_groups import parameter_groups

SEQUENCES, LENGTH = 20, 48
STEPS = {"autoregressive": 150, "masked": 600}


FAMILIES = [
    ("uniform", {"loss": "simple"}, {"time_conditioning": True}, 300, 0.7),
    ("interpolating", {"noise": "hybrid", "loss": "dynamic"}, {}, 300, 0.75),
    ("block", {"block_size": 8}, {}, 150, 0.3),
    ("esoteric", {"alpha0": 0.5}, {}, 150, 0.6),
]
"""Objective, its fields, the model's, steps, and the share of the unigram entropy to get below.
Families that read their context through noise leave that entropy later: their gradients are
noisier (benchmarks/gradient_noise.py)."""


def setup(topology, pool, objective, fields=None, model=None):
    """A small module, the clean batch of twenty sequences, and their unigram entropy in nats."""
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
        num_layers=2, hidden_size=64, num_attention_heads=4, init_std=0.05, **(model or {})
    )
    space = token_space(load_tokenizer(pool / "tokenizer.model"), shape)
    model = Transformer(shape, space, topology)
    initialize(model, seed=0)
    config = objectives.make(name=objective, time_window=SEQUENCES, **(fields or {}))
    module = ObjectiveModule(model, build_objective(config, space))
    tokens = TokenPool(pool / "train" / "manifest.json")
    stream = TokenStream(tokens, Budget(SEQUENCES * LENGTH, LENGTH, 10**6), seed=0, epochs=1)
    clean = clean_batch(stream.read(np.arange(SEQUENCES)))
    share = torch.bincount(clean.tokens.flatten()).double() / clean.tokens.numel()
    entropy = float(-(share[share > 0] * share[share > 0].log()).sum())
    return module, clean, entropy


def learn(module, clean, steps, change=lambda batch, step: batch):
    """AdamW on the twenty sequences, new noise at every step; the training losses."""
    groups = parameter_groups(module, OptimizerConfig(weight_decay=0.0))
    rates = [{**group, "lr": 3e-3 * group.get("lr_scale", 1.0)} for group in groups]
    optimizer = torch.optim.AdamW(rates)
    losses = []
    for step in range(steps):
        noise = NoiseKey(0, clean.position + step * SEQUENCES)
        batch = change(module.objective.corrupt(clean, noise), step)
        loss = module(batch) / clean.tokens.numel()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def bound(module, clean):
    """Exact bound of the twenty sequences in nats per token, averaged over draws."""
    draws = [NoiseKey(99, clean.position + i * SEQUENCES) for i in range(8)]
    with torch.no_grad():
        totals = [module(module.objective.bound_batch(clean, d), exact=True).sum() for d in draws]
    return float(torch.stack(totals).mean()) / clean.tokens.numel()


@pytest.mark.parametrize("objective", list(STEPS))
def test_twenty_sequences_are_memorised_far_below_their_entropy(topology, pool, objective):
    module, clean, entropy = setup(topology, pool, objective)
    assert entropy > 4
    assert bound(module, clean) > entropy
    losses = learn(module, clean, STEPS[objective])
    assert np.mean(losses[-20:]) < 0.25 * entropy
    assert bound(module, clean) < 0.25 * entropy


@pytest.mark.parametrize(("objective", "fields", "model", "steps", "share"), FAMILIES, ids=str)
def test_every_family_learns_what_its_bound_measures(
    topology, pool, objective, fields, model, steps, share
):
    """Surrogates too: what falls is the exact bound, whatever is trained."""
    module, clean, entropy = setup(topology, pool, objective, fields, model)
    assert bound(module, clean) > entropy
    learn(module, clean, steps)
    assert bound(module, clean) < share * entropy


def test_gaussian_diffusion_learns_more_than_the_frequencies_of_tokens(topology, pool):
    """It starts far above them, because it has to find embeddings first."""
    module, clean, entropy = setup(topology, pool, "gaussian")
    assert bound(module, clean) > 1.3 * entropy
    learn(module, clean, 300)
    assert bound(module, clean) < 0.975 * entropy


@pytest.mark.parametrize("objective", list(STEPS))
def test_targets_reshuffled_at_every_step_cannot_be_learned(topology, pool, objective):
    """Whatever falls below the unigram entropy here would come through a leak of the targets."""

    def reshuffle(batch: TrainBatch, step: int) -> TrainBatch:
        order = torch.randperm(len(batch.targets), generator=torch.Generator().manual_seed(step))
        return TrainBatch(**{**batch.__dict__, "targets": batch.targets[order]})

    module, clean, entropy = setup(topology, pool, objective)
    losses = learn(module, clean, STEPS[objective] // 2, reshuffle)
    assert np.mean(losses[-50:]) > 0.95 * entropy
