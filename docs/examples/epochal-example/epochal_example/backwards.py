"""Right to left: autoregressive prediction of each token from those that follow it.

The likelihood is exact, as left to right; on the same tokens the two say how much easier a text is
to read forwards than backwards.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from pretrain.batch import AttentionKind, AttentionRule, CleanBatch, TrainBatch
from pretrain.config.objectives import ObjectiveConfig, objectives
from pretrain.config.run import Config
from pretrain.config.samplers import AncestralConfig
from pretrain.module import ObjectiveModule
from pretrain.noise.key import NoiseKey
from pretrain.objectives.base import Objective, sequence_rows
from pretrain.sampling.autoregressive import sample_autoregressive
from pretrain.sampling.sampler import Drawn, Sampler


@objectives.register
class BackwardsConfig(ObjectiveConfig):
    """Settings; the name is the one that pyproject.toml declares."""

    name: Literal["backwards"] = "backwards"
    implementation: ClassVar[str] = "epochal_example.backwards:Backwards"

    repeat_last: int = 0
    """Further passes over the last token of each sequence that count in training."""

    def check(self, config: Config) -> None:
        """Refuse documents kept apart, whose order this family does not turn."""
        super().check(config)
        if config.data.documents == "masked":
            raise ValueError("objective backwards needs data.documents=packed")


class Backwards(Objective):
    """Next-token prediction of the reversed sequence."""

    config: BackwardsConfig

    exact_likelihood = True
    causal = True

    def attention_kinds(self, documents_apart: bool) -> tuple[AttentionKind, ...]:
        """Causal always."""
        return ("causal",)

    def corrupt(self, clean: CleanBatch, noise: NoiseKey) -> TrainBatch:
        """Reverse the valid tokens of each row and shift them right."""
        b, s = clean.tokens.shape
        place = torch.arange(s).expand(b, s)
        length = clean.valid.sum(dim=1, keepdim=True)
        mirrored = torch.where(place < length, length - 1 - place, place)
        tokens = clean.tokens.gather(1, mirrored)
        first = torch.full((b, 1), self.space.doc_id)
        weight = clean.valid.float()
        weight[:, 0] += self.config.repeat_last
        return TrainBatch(
            ids=torch.cat((first, tokens[:, :-1]), dim=1),
            positions=torch.arange(s)[None],
            attention=AttentionRule("causal"),
            noise_level=None,
            rows=None,
            targets=torch.where(clean.valid, tokens, self.space.doc_id).flatten(),
            weight=weight.flatten(),
            sequence=sequence_rows(b, s),
        )

    def bound_batch(self, clean: CleanBatch, noise: NoiseKey) -> TrainBatch:
        """The likelihood: every token once."""
        batch = self.corrupt(clean, noise)
        return TrainBatch(**{**batch.__dict__, "weight": clean.valid.flatten().double()})

    def sampler(self, settings: AncestralConfig) -> Sampler:
        """One token a pass from the end of the text to its beginning; a prompt is its end."""

        def draw(module: ObjectiveModule, prompt: Tensor, noise: NoiseKey, length: int) -> Drawn:
            tokens, passes = sample_autoregressive(
                module.model,
                prompt.flip(1),
                noise,
                length=length,
                temperature=settings.temperature,
                top_p=settings.top_p,
            )
            return tokens.flip(1), passes

        return Sampler("backwards", draw, steps=False)
