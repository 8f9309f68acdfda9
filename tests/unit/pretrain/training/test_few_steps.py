"""What distillation is for: better samples in few steps than more training of the model gives.

The language is a chain over 16 symbols in which 95 % of the successors are given, so that a sample
is judged without a model: by the share of successors that are right.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from pretrain.batch import CleanBatch
from pretrain.config.objectives import objectives
from pretrain.config.run import ModelConfig
from pretrain.noise.key import NoiseKey
from pretrain.objectives import build_objective
from pretrain.vocabulary import TokenSpace

K, LENGTH, BATCH = 16, 12, 64
SPACE = TokenSpace(2 + K, 32, 0, 1, 2, (0, 1))
TRAINED, ROUND, ROUNDS = 800, 60, 4


def text(step):
    """A batch of the language, new for every step."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randint(0, K, (BATCH, LENGTH), generator=generator)
    for i in range(1, LENGTH):
        follows = torch.rand(BATCH, generator=generator) < 0.95
        x[:, i] = torch.where(follows, (5 * x[:, i - 1] + 3) % K, x[:, i])
    return CleanBatch(
        tokens=x + 2,
        position=step * BATCH + torch.arange(BATCH),
        segment=torch.zeros(BATCH, LENGTH, dtype=torch.int32),
        valid=torch.ones(BATCH, LENGTH, dtype=torch.bool),
        all_valid=True,
    )


def learn(module, first, steps, lr):
    """AdamW with a short warm-up; the teacher, where there is one, is renewed as training does."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=lr, weight_decay=0.0)
    for step in range(steps):
        clean = replace(text(first + step), position=step * BATCH + torch.arange(BATCH))
        if module.teacher is not None and module.objective.begins_round(step * BATCH):
            module.teacher.renew(module.model)
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 20)
        batch = module.objective.corrupt(clean, NoiseKey(first, clean.position))
        optimizer.zero_grad()
        (module(batch) / (BATCH * LENGTH)).backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()


def quality(model, steps, samples=800):
    """Share of right successors, its standard error, and the entropy of single symbols."""
    from pretrain.sampling.interpolating import sample_interpolating

    process = build_objective(objectives.make(name="uniform"), SPACE).process
    empty = torch.zeros(samples, 0, dtype=torch.int64)
    noise = NoiseKey(1, torch.arange(samples))
    x, _ = sample_interpolating(model, process, empty, noise, length=LENGTH, steps=steps)
    x = x - 2
    right = (x[:, 1:] == (5 * x[:, :-1] + 3) % K).double().mean(dim=1)
    share = torch.bincount(x.flatten(), minlength=K).double() / x.numel()
    return (
        float(right.mean()),
        float(right.std()) / samples**0.5,
        -float((share * share.log()).sum()),
    )


@pytest.mark.slow
def test_a_distilled_model_needs_fewer_steps_than_one_trained_on(topology):
    """Four rounds against as many steps of ordinary training from the same weights."""
    from pretrain.model.initialize import initialize
    from pretrain.model.teacher import Teacher
    from pretrain.model.transformer import Transformer
    from pretrain.module import ObjectiveModule

    shape = ModelConfig(
        num_layers=2, hidden_size=64, num_attention_heads=4, init_std=0.05,
        time_conditioning=True, vocab_multiple=32,
    )  # fmt: skip
    model, copy = (Transformer(shape, SPACE, topology) for _ in range(2))
    initialize(model, seed=0)
    uniform = objectives.make(name="uniform", time_window=BATCH)
    plain = ObjectiveModule(model, build_objective(uniform, SPACE))
    learn(plain, 0, TRAINED, 3e-3)
    trained = {name: p.detach().clone() for name, p in model.named_parameters()}
    learn(plain, 20_000, ROUND * ROUNDS, 1e-3)
    steps = (1, 2)
    control = [quality(model, n) for n in steps]
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(trained[name])
    config = objectives.make(
        name="distillation", time_window=BATCH, round_sequences=ROUND * BATCH, first_gap=1 / 16
    )
    distil = ObjectiveModule(model, build_objective(config, SPACE))
    distil.teacher = Teacher(copy)
    learn(distil, 10_000, ROUND * ROUNDS, 1e-3)
    for n, (was, error, _), (now, noise, entropy) in zip(
        steps, control, [quality(model, n) for n in steps], strict=True
    ):
        print(
            f"{n} steps: {was:.3f} +- {error:.3f} -> {now:.3f} +- {noise:.3f}, {entropy:.2f} nats"
        )
        assert now - was > 4 * (error**2 + noise**2) ** 0.5, n
        assert entropy > 2.7  # ln 16 is 2.77: nothing has collapsed
