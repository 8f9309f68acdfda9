"""`epochal sample`: text from a trained run, every sample stored with its settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pretrain.config.samplers import SamplerConfig, samplers
from pretrain.errors import ConfigError
from pretrain.evaluation.restore import Restored, Weights, restore
from pretrain.noise.key import NoiseKey
from pretrain.results import append_results
from pretrain.sampling.prompt import without_trailing_space
from pretrain.sampling.result import Sample
from pretrain.sampling.sampler import Sampler

BATCH = 16


def sample_run(
    run: Path,
    settings: SamplerConfig | None = None,
    *,
    checkpoint: Path | None = None,
    weights: Weights | None = None,
    num: int = 4,
    seed: int = 0,
    prompt: str = "",
    length: int | None = None,
) -> list[dict[str, Any]]:
    """Draw `num` sequences of `length` tokens (default: as trained) that begin with `prompt`.

    Spaces at the end of the prompt are left out; the results hold the prompt that was used.
    `settings` are those of the sampler; None takes the family's reverse process with its defaults.
    Results are appended to `RUN/samples.jsonl`. Raises ConfigError for unusable settings.
    """
    _check(num, seed)
    prompt = without_trailing_space(prompt)
    settings = settings or samplers.make("ancestral")
    restored = restore(run, checkpoint, weights)
    objective = restored.module.objective
    sampler: Sampler = settings.load()(settings, objective)
    length = length or restored.config.data.seq_length
    given = restored.tokenizer.encode(prompt)
    if len(given) >= length:
        raise ConfigError(
            f"the prompt has {len(given)} tokens; allowed: fewer than the {length} of a sequence; "
            "shorten it"
        )
    chosen = settings.model_dump(mode="json", exclude={"steps"})
    about: dict[str, Any] = {
        **{("sampler" if key == "name" else key): value for key, value in chosen.items()},
        "length": length,
        "prompt": prompt,
        "checkpoint": restored.checkpoint.name,
        "weights": restored.weights,
        "run": str(run),
    }
    if sampler.steps:
        about["steps"] = settings.steps or length
    samples: list[Sample] = []
    for first in range(0, num, BATCH):
        index = torch.arange(first, min(num, first + BATCH))
        tokens = torch.tensor(given, dtype=torch.int64)
        samples += _draw(restored, sampler, index, tokens, seed, about)
    results = [sample.to_dict() for sample in samples]
    append_results(run / "samples.jsonl", results)
    return results


def _draw(
    restored: Restored,
    sampler: Sampler,
    index: Tensor,
    given: Tensor,
    seed: int,
    about: dict[str, Any],
) -> list[Sample]:
    """Draw one batch of samples, numbered `index`."""
    device = restored.runtime.device
    prompt = given.to(device).expand(len(index), -1)
    noise = NoiseKey(seed, index.to(device))
    tokens, passes = sampler.draw(restored.module, prompt, noise, about["length"])
    evaluations = torch.as_tensor(passes).expand(len(index)).tolist()
    return [
        Sample(
            text=restored.tokenizer.decode_visible(row),
            tokens=row,
            sampler=sampler.name,
            seed=seed,
            index=number,
            network_evaluations=count,
            settings=about,
        )
        for row, number, count in zip(tokens.tolist(), index.tolist(), evaluations, strict=True)
    ]


def _check(num: int, seed: int) -> None:
    for name, value, allowed, good in (
        ("num", num, "1 or more", num >= 1),
        ("seed", seed, "0 to 2^63 - 1", 0 <= seed < 1 << 63),
    ):
        if not good:
            raise ConfigError(f"{name} is {value}; allowed: {allowed}")
