"""`epochal sample`: text from a trained run, every sample stored with what drew it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pretrain.errors import ConfigError
from pretrain.evaluation.restore import Restored, Weights, restore
from pretrain.noise.key import NoiseKey
from pretrain.objectives.autoregressive import Autoregressive
from pretrain.objectives.block import Block
from pretrain.objectives.esoteric import Esoteric
from pretrain.objectives.gaussian import Gaussian
from pretrain.objectives.interpolating import Noised
from pretrain.objectives.masked import Masked
from pretrain.sampling.autoregressive import sample_autoregressive
from pretrain.sampling.gaussian import sample_gaussian
from pretrain.sampling.interpolating import sample_interpolating
from pretrain.sampling.masked import sample_masked
from pretrain.sampling.ordered import sample_block, sample_esoteric
from pretrain.sampling.result import Sample

BATCH = 16


def sample_run(
    run: Path,
    *,
    checkpoint: Path | None = None,
    weights: Weights | None = None,
    num: int = 4,
    steps: int | None = None,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    prompt: str = "",
    length: int | None = None,
    greedy_tail: bool = False,
) -> list[dict[str, Any]]:
    """Draw `num` sequences of `length` tokens (default: the trained one) that begin with `prompt`.

    `steps` is the number of denoising steps (default: one a token; autoregressive has no choice).
    `greedy_tail` takes the mode in the last step, where a family revises tokens (uniform,
    distillation, interpolating). Results are appended to `RUN/samples.jsonl`. Raises ConfigError
    for unusable settings.
    """
    _check(num, temperature, top_p, steps, seed)
    restored = restore(run, checkpoint, weights)
    length = length or restored.config.data.seq_length
    given = restored.tokenizer.encode(prompt)
    if len(given) >= length:
        raise ConfigError(
            f"the prompt has {len(given)} tokens and the sequence {length}; shorten the prompt"
        )
    settings: dict[str, Any] = {
        "temperature": temperature,
        "top_p": top_p,
        "length": length,
        "prompt": prompt,
        "checkpoint": restored.checkpoint.name,
        "weights": restored.weights,
        "run": str(run),
    }
    if restored.module.objective.name != "autoregressive":
        settings["steps"] = steps or length
    if greedy_tail:
        objective = restored.module.objective
        if not isinstance(objective, Noised):
            raise ConfigError(
                f"a greedy tail is defined for uniform, distillation and interpolating diffusion; "
                f"{run} is {objective.name}: leave it out"
            )
        settings["greedy_tail"] = True
    samples: list[Sample] = []
    for first in range(0, num, BATCH):
        index = torch.arange(first, min(num, first + BATCH))
        samples += _draw(restored, index, torch.tensor(given, dtype=torch.int64), seed, settings)
    results = [sample.to_dict() for sample in samples]
    with (run / "samples.jsonl").open("a") as log:
        log.writelines(json.dumps(result) + "\n" for result in results)
    return results


def _draw(
    restored: Restored, index: Tensor, given: Tensor, seed: int, settings: dict[str, Any]
) -> list[Sample]:
    """One batch of samples numbered `index`."""
    device = restored.runtime.device
    prompt = given.to(device).expand(len(index), -1)
    noise = NoiseKey(seed, index.to(device))
    names = ("length", "temperature", "top_p", "steps", "greedy_tail")
    chosen = {k: settings[k] for k in names if k in settings}
    sampler, (tokens, passes) = _run(restored, prompt, noise, chosen)
    evaluations = torch.as_tensor(passes).expand(len(index)).tolist()
    return [
        Sample(
            text=restored.tokenizer.decode_visible(row),
            tokens=row,
            sampler=sampler,
            seed=seed,
            index=number,
            network_evaluations=count,
            settings=settings,
        )
        for row, number, count in zip(tokens.tolist(), index.tolist(), evaluations, strict=True)
    ]


def _run(
    restored: Restored, prompt: Tensor, noise: NoiseKey, chosen: dict[str, Any]
) -> tuple[str, tuple[Tensor, Tensor | int]]:
    """Name of the family's sampler, and what it drew: tokens and forward passes."""
    model, objective = restored.module.model, restored.module.objective
    if isinstance(objective, Autoregressive):
        return "autoregressive", sample_autoregressive(model, prompt, noise, **chosen)
    if isinstance(objective, Masked):
        return "ancestral", sample_masked(model, prompt, noise, **chosen)
    if isinstance(objective, Noised):
        process = objective.process
        return "ancestral", sample_interpolating(model, process, prompt, noise, **chosen)
    if isinstance(objective, Block):
        # `steps` are those of a whole sequence; each block takes its share.
        size = objective.config.block_size
        blocks = -(-chosen["length"] // size)
        chosen = {**chosen, "steps": -(-chosen["steps"] // blocks)}
        return "block", sample_block(model, prompt, noise, block_size=size, **chosen)
    if isinstance(objective, Gaussian):
        own, remember = restored.module.own, objective.config.self_conditioning > 0
        return "ancestral", sample_gaussian(model, own, prompt, noise, remember=remember, **chosen)
    if isinstance(objective, Esoteric):
        return "esoteric", sample_esoteric(model, prompt, noise, alpha0=objective.alpha0, **chosen)
    raise ConfigError(f"objective {objective.name!r} has no sampler")


def _check(num: int, temperature: float, top_p: float, steps: int | None, seed: int) -> None:
    for name, value, allowed, good in (
        ("num", num, "1 or more", num >= 1),
        ("temperature", temperature, "0 or more", temperature >= 0),
        ("top_p", top_p, "above 0 and at most 1", 0 < top_p <= 1),
        ("seed", seed, "0 to 2^63 - 1", 0 <= seed < 1 << 63),
        ("steps", steps, "1 to 65,535", steps is None or 1 <= steps < 1 << 16),
    ):
        if not good:
            raise ConfigError(f"{name} is {value}; allowed: {allowed}")
