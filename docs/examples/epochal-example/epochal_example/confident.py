"""Confidence decoding of masked diffusion (MaskGIT, LLaDA): reveal the surest tokens first."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from pretrain.batch import AttentionRule
from pretrain.config.samplers import SamplerConfig, samplers
from pretrain.errors import ConfigError
from pretrain.module import ObjectiveModule
from pretrain.noise.key import NoiseKey
from pretrain.objectives.base import Objective
from pretrain.objectives.masked import Masked
from pretrain.sampling.draw import gumbel_argmax, sharpen
from pretrain.sampling.sampler import Drawn, Sampler


@samplers.register
class ConfidentConfig(SamplerConfig):
    """Settings; `steps` passes share the masked tokens evenly."""

    name: Literal["confident"] = "confident"
    implementation: ClassVar[str] = "epochal_example.confident:confident"


def confident(settings: ConfidentConfig, objective: Objective) -> Sampler:
    """The sampler of a masked model; raises ConfigError for other families."""
    if not isinstance(objective, Masked):
        raise ConfigError(f"sampler=confident fills in <mask>; the run is {objective.name}")

    @torch.no_grad()
    def draw(module: ObjectiveModule, prompt: Tensor, noise: NoiseKey, length: int) -> Drawn:
        (b, given), model = prompt.shape, module.model
        mask, steps = model.space.mask_id, min(settings.steps or length, length - prompt.shape[1])
        ids = torch.full((b, length), mask, device=prompt.device)
        ids[:, :given] = prompt
        positions = torch.arange(length, device=ids.device)[None]
        for step in range(steps):
            hidden = model(ids, positions, AttentionRule("bidirectional")).transpose(0, 1)
            logits = sharpen(
                model.vocabulary(hidden.flatten(0, 1)).logits, settings.temperature, settings.top_p
            )
            uniform = noise.fine_uniform("sample", logits.numel() // b, draw=step)
            drawn = gumbel_argmax(logits, uniform.view_as(logits))
            sure = logits.log_softmax(-1).gather(1, drawn[:, None]).view(b, length)
            sure = torch.where(ids == mask, sure, -torch.inf)
            left = length - given - (length - given) * step // steps
            count = left - (length - given - (length - given) * (step + 1) // steps)
            best = sure.topk(count, dim=1).indices
            ids.scatter_(1, best, drawn.view(b, length).gather(1, best))
        return ids, steps

    return Sampler("confident", draw)
