"""Likelihood of validation text: an exact bound with its standard error, for any objective.

Noise is keyed by a constant seed and the validation sequence, not by the run. So two checkpoints,
also of different families, get the same noise levels, and their difference has less noise than
either of them. Sums are float64 and kept by sequence, so that the result does not depend on the
layout:

    bounds [draws, parts, sequences]   nats; a data-parallel rank fills its batches, the rest is 0
      -> all-reduce over ranks         every entry is non-zero on one rank only
      -> sum over parts                [draws, sequences], the bound of each sequence
      -> mean over draws               each sequence's estimate; draws are successive strata of t
      -> sum / number of tokens        nats per token, with two errors:
             standard error            spread over sequences: text and noise together
             noise error               spread over draws of a sequence: noise alone
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
"""Number of consecutive sequences over which noise levels are stratified, besides the draws."""


@dataclass(frozen=True)
class Likelihood:
    """Negative log-likelihood of validation tokens, or an upper bound of it."""

    nats_per_token: float
    standard_error: float
    """Standard error of the mean over sequences in nats per token, from text and noise together.
    It ignores that noise levels are stratified, and so is an upper estimate."""
    noise_error: float | None
    """Standard error from noise draws alone; None with a single draw, 0 for an exact likelihood."""
    bits_per_byte: float
    tokens: int
    sequences: int
    draws: int
    is_bound: bool
    """False where the objective's likelihood is exact (autoregressive)."""
    parts: dict[str, float] = field(default_factory=dict)
    """Parts of the bound in nats per token, where the objective names some."""

    def metrics(self, prefix: str) -> dict[str, float]:
        """Measurements for tracking, under `prefix/`."""
        metrics = {
            f"{prefix}/nats_per_token": self.nats_per_token,
            f"{prefix}/standard_error": self.standard_error,
            f"{prefix}/bits_per_byte": self.bits_per_byte,
        }
        if self.noise_error is not None:
            metrics[f"{prefix}/noise_error"] = self.noise_error
        return metrics | {f"{prefix}/{name}": value for name, value in self.parts.items()}

    def to_dict(self) -> dict[str, Any]:
        """Result as plain JSON."""
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
    """Evaluate the bound of the first `settings.sequences` of `stream`.

    `score` maps a bound batch to the bound of each of its sequences, float64 [b], or to the parts
    that the objective names, [parts b]. A data-parallel rank scores every dp_size-th batch.
    """
    sequences = min(settings.sequences or stream.total_positions, stream.total_positions)
    draws = 1 if objective.exact_likelihood else settings.draws
    # A copy with the same time window for every run, so that all get the same noise levels.
    config = objective.config.model_copy(update={"time_window": EVALUATION_WINDOW})
    evaluated = build_objective(config, objective.space)
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
            batch = evaluated.bound_batch(clean, noise).to(device)
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
    """Estimate the likelihood and its errors from bounds [draws, sequences] in nats.

    `tokens` [sequences] are the valid tokens of each sequence. The standard error is that of a
    ratio of sums over independent sequences.
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
            # Draws of a sequence come from successive strata. The means of neighbouring strata
            # differ least, so that half their squared difference is the tightest upper estimate.
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
