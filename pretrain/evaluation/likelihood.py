"""Likelihood of validation text: an exact bound with its standard error, for any objective.

Noise is keyed by a constant seed and the validation sequence, not by the run: two checkpoints, also
of different families, see the same noise levels, so that their difference has less noise than
either. The sums are float64 and gathered by sequence, so the result does not depend on the layout.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from data_pipeline.stream.stream import Stream
from pretrain.batch import TrainBatch
from pretrain.config.run import EvaluationConfig
from pretrain.data import bytes_per_token, clean_batch
from pretrain.noise.key import NoiseKey
from pretrain.objectives import Objective, build_objective

EVALUATION_SEED = 0
"""Seed of evaluation noise, the same for every run."""
EVALUATION_WINDOW = 64
"""Noise levels are stratified over this many consecutive sequences, and over a sequence's draws."""


@dataclass(frozen=True)
class Likelihood:
    """Negative log-likelihood of validation tokens, or an upper bound of it."""

    nats_per_token: float
    standard_error: float
    """Of the mean over sequences, in nats per token: sampling of text and noise together. Noise
    levels are stratified, which this ignores: it is an upper estimate."""
    noise_error: float | None
    """The part that comes from noise draws alone; None with a single draw, 0 where it is exact."""
    bits_per_byte: float
    tokens: int
    sequences: int
    draws: int
    is_bound: bool
    """False where the objective's likelihood is exact (autoregressive)."""
    parts: dict[str, float] = field(default_factory=dict)
    """Parts of the bound in nats per token, where the objective tells them apart."""

    def metrics(self, prefix: str) -> dict[str, float]:
        """Numbers for tracking, under `prefix/`."""
        metrics = {
            f"{prefix}/nats_per_token": self.nats_per_token,
            f"{prefix}/standard_error": self.standard_error,
            f"{prefix}/bits_per_byte": self.bits_per_byte,
        }
        if self.noise_error is not None:
            metrics[f"{prefix}/noise_error"] = self.noise_error
        return metrics | {f"{prefix}/{name}": value for name, value in self.parts.items()}

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)


def evaluate_likelihood(
    objective: Objective,
    stream: Stream,
    score: Callable[[TrainBatch], Tensor],
    settings: EvaluationConfig,
    *,
    device: torch.device,
    dp_rank: int = 0,
    dp_size: int = 1,
    dp_group: dist.ProcessGroup | None = None,
) -> Likelihood:
    """Bound of the first `settings.sequences` of `stream`.

    `score` maps a bound batch to the bound of each of its sequences, float64 [b], or to the parts
    of it that the objective names, [parts b]; every dp_size-th batch is scored by a data-parallel
    rank.
    """
    sequences = min(settings.sequences or stream.total_positions, stream.total_positions)
    draws = 1 if objective.exact_likelihood else settings.draws
    config = objective.config.model_copy(update={"time_window": EVALUATION_WINDOW})
    paired = build_objective(config, objective.space)
    parts = len(objective.bound_parts) or 1
    bounds = torch.zeros(draws, parts, sequences, dtype=torch.float64, device=device)
    starts = range(0, sequences, settings.batch_size)
    for number, start in enumerate(starts):
        if number % dp_size != dp_rank:
            continue
        clean = clean_batch(stream.read(np.arange(start, start + settings.batch_size)))
        count = min(settings.batch_size, sequences - start)
        for draw in range(draws):
            noise = NoiseKey(EVALUATION_SEED, clean.position, draw, stratum=(draw, draws))
            batch = paired.bound_batch(clean, noise).to(device)
            bounds[draw, :, start : start + count] = score(batch).view(parts, -1)[:, :count]
    if dp_size > 1:  # every entry is non-zero on one rank only: the sum is exact
        dist.all_reduce(bounds, group=dp_group)
    tokens = np.array([stream.num_valid(i, i + 1) for i in range(sequences)])
    likelihood = summarize(
        bounds.sum(dim=1).cpu().numpy(),
        tokens,
        bytes_per_token(stream),
        not objective.exact_likelihood,
    )
    each = (bounds.mean(dim=0).sum(dim=1) / int(tokens.sum())).tolist()
    return replace(likelihood, parts=dict(zip(objective.bound_parts, each, strict=False)))


def summarize(
    bounds: np.ndarray, tokens: np.ndarray, bytes_per_token: float, is_bound: bool
) -> Likelihood:
    """Ratio estimate and its errors from bounds [draws, sequences] in nats and tokens [sequences].

    The standard error is that of a ratio of sums over independent sequences.
    """
    draws, sequences = bounds.shape
    total = int(tokens.sum())
    each = bounds.mean(axis=0)
    mean = float(each.sum()) / total
    spread = each - mean * tokens
    correction = sequences / max(1, sequences - 1)
    error = math.sqrt(correction * float((spread**2).sum())) / total
    noise: float | None = 0.0
    if is_bound:
        noise = None
        if draws > 1:
            # Draws of a sequence come from successive strata: neighbours differ least in their
            # means, so that half their squared difference is the tightest upper estimate.
            variance = (np.diff(bounds, axis=0) ** 2).mean(axis=0) / 2.0
            noise = math.sqrt(float(variance.sum()) / draws) / total
    return Likelihood(
        nats_per_token=mean,
        standard_error=error,
        noise_error=noise,
        bits_per_byte=mean / math.log(2.0) / bytes_per_token,
        tokens=total,
        sequences=sequences,
        draws=draws,
        is_bound=is_bound,
    )
