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
             noise error               spread over neighbouring strata of a sequence: noise alone
      -> sum / bytes of the same text  bits per byte
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
from pretrain.data import clean_batch
from pretrain.evaluation.text_bytes import TextBytes
from pretrain.noise.key import NoiseKey
from pretrain.objectives import Objective, build_objective

EVALUATION_SEED = 0
"""Seed of evaluation noise, the same for every run."""
EVALUATION_WINDOW = 64
"""Number of consecutive sequences over which noise levels are stratified, besides the draws."""


class InterruptedEvaluation(Exception):  # noqa: N818
    """A signal came; there is no result."""


@dataclass(frozen=True)
class Likelihood:
    """Negative log-likelihood of validation tokens, or an upper bound of it."""

    nats_per_token: float
    standard_error: float | None
    """Standard error of the mean over sequences in nats per token, from text and noise together;
    None with a single sequence. It ignores that noise levels are stratified over sequences, and so
    is an upper estimate."""
    noise_error: float | None
    """Standard error from noise draws alone, an upper estimate in nats per token; None with a
    single draw, 0 for an exact likelihood."""
    bits_per_byte: float
    tokens: int
    """Tokens that were scored."""
    text_bytes: int
    """UTF-8 bytes of the text that these tokens encode; separators encode none."""
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
            f"{prefix}/bits_per_byte": self.bits_per_byte,
        }
        if self.standard_error is not None:
            metrics[f"{prefix}/standard_error"] = self.standard_error
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
    text_bytes: TextBytes,
    *,
    device: torch.device,
    dp_rank: int = 0,
    dp_size: int = 1,
    dp_group: dist.ProcessGroup | None = None,
    interrupted: Callable[[], bool] = lambda: False,
) -> Likelihood:
    """Evaluate the bound of the first `settings.sequences` of `stream`, or of its first epoch.

    `score` maps a bound batch to the bound of each of its sequences, float64 [b], or to the parts
    that the objective names, [parts b]. A data-parallel rank scores every dp_size-th batch.
    `interrupted` is asked before each batch, as often on every rank; InterruptedEvaluation where it
    says so.
    """
    sequences = min(settings.sequences or stream.sequences_per_epoch, stream.total_positions)
    draws = 1 if objective.exact_likelihood else settings.draws
    # A copy with the same time window for every run, so that all get the same noise levels.
    config = objective.config.model_copy(update={"time_window": EVALUATION_WINDOW})
    evaluated = build_objective(config, objective.space)
    parts = len(objective.bound_parts) or 1
    bounds = torch.zeros(draws, parts, sequences, dtype=torch.float64, device=device)
    scored = torch.zeros(2, sequences, dtype=torch.int64, device=device)  # tokens, their bytes
    starts = range(0, sequences, settings.batch_size)
    # ZeRO 3 needs the same number of forward passes on every rank: where batches run out, a rank
    # repeats the last one and drops the result.
    for number in range(dp_rank, -(-len(starts) // dp_size) * dp_size, dp_size):
        if interrupted():
            raise InterruptedEvaluation
        start = starts[min(number, len(starts) - 1)]
        clean = clean_batch(stream.read(np.arange(start, start + settings.batch_size)))
        count = min(settings.batch_size, sequences - start) if number < len(starts) else 0
        scored[0, start : start + count] = clean.valid.sum(dim=1)[:count]
        scored[1, start : start + count] = text_bytes.count(clean, stream)[:count]
        for draw in range(draws):
            noise = NoiseKey(EVALUATION_SEED, clean.position, draw, stratum=(draw, draws))
            batch = evaluated.bound_batch(clean, noise).to(device)
            bounds[draw, :, start : start + count] = score(batch).view(parts, -1)[:, :count]
    if dp_size > 1:  # every entry is non-zero on one rank only: the sum is exact
        dist.all_reduce(bounds, group=dp_group)
        dist.all_reduce(scored, group=dp_group)
    tokens, encoded = scored.cpu().numpy()
    likelihood = summarize(
        bounds.sum(dim=1).cpu().numpy(),
        tokens,
        int(encoded.sum()),
        is_bound=not objective.exact_likelihood,
        texts=_distinct(stream, sequences),
    )
    each = (bounds.mean(dim=0).sum(dim=1) / likelihood.tokens).tolist()
    return replace(likelihood, parts=dict(zip(objective.bound_parts, each, strict=False)))


def summarize(
    bounds: np.ndarray,
    tokens: np.ndarray,
    text_bytes: int,
    *,
    is_bound: bool,
    texts: np.ndarray | None = None,
) -> Likelihood:
    """Estimate the likelihood and its errors from bounds [draws, sequences] in nats.

    `tokens` [sequences] are the scored tokens of each sequence, `text_bytes` the bytes that all of
    them encode. `texts` [sequences] has a number for each sequence, the same where the text is the
    same; None where every text is another.
    """
    draws, sequences = bounds.shape
    total = int(tokens.sum())
    each = bounds.mean(axis=0)
    nats = float(each.sum())
    if not is_bound:
        noise_error: float | None = 0.0
    else:
        noise_error = None if draws == 1 else math.sqrt(_noise_variance(bounds)) / draws / total
    variance = _text_variance(each, tokens, np.arange(sequences) if texts is None else texts)
    return Likelihood(
        nats_per_token=nats / total,
        standard_error=None if variance is None else math.sqrt(variance) / total,
        noise_error=noise_error,
        bits_per_byte=nats / math.log(2.0) / text_bytes if text_bytes else math.inf,
        tokens=total,
        text_bytes=text_bytes,
        sequences=sequences,
        draws=draws,
        is_bound=is_bound,
    )


def _noise_variance(bounds: np.ndarray) -> float:
    """Estimate the variance of the sum of bounds [draws, sequences] that comes from noise alone.

    Draws are independent and come from successive strata, which differ in variance and in mean:
    those of least noise vary by far the most. Disjoint pairs of neighbours give every stratum the
    same weight: the expectation of their squared difference is the sum of both variances, and the
    squared difference of both means on top. So the estimate errs upwards only. Of an odd number of
    draws the last three form one group of three, with the same property.
    """
    draws, total = len(bounds), 0.0
    for first in range(0, draws - 1, 2):
        group = bounds[first : draws if first + 3 == draws else first + 2]
        squares = ((group - group.mean(axis=0)) ** 2).sum()
        total += float(squares) * len(group) / (len(group) - 1)  # for a pair d^2
    return total


def _text_variance(each: np.ndarray, tokens: np.ndarray, texts: np.ndarray) -> float | None:
    """Estimate the variance of the sum of `each` [sequences] around its mean per token.

    It is that of a ratio of sums over independent texts; None for a single text. Sequences of the
    same text are one sample, not several.
    """
    spread = each - each.sum() / tokens.sum() * tokens
    _, index = np.unique(texts, return_inverse=True)
    by_text = np.bincount(index, spread)
    count = len(by_text)
    return None if count == 1 else count / (count - 1) * float((by_text**2).sum())


def _distinct(stream: Stream, sequences: int) -> np.ndarray:
    """Number the texts at positions [0, sequences): positions that repeat a text share one."""
    part, sequence = stream.sequences_at(np.arange(sequences))
    _, numbers = np.unique(np.stack((part, sequence)), axis=1, return_inverse=True)
    return numbers.reshape(sequences)
