"""Measurements on validation text that an objective adapts its training to.

Only objectives that declare `adapts` do this (block diffusion moves its interval of noise levels).
The sums are reduced over ranks before the choice, so that all ranks choose the same.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from data_pipeline.stream.stream import TokenStream
from pretrain.batch import TrainBatch
from pretrain.config.run import Config
from pretrain.data import clean_batch
from pretrain.evaluation.likelihood import InterruptedEvaluation
from pretrain.noise.key import NoiseKey
from pretrain.objectives import Objective

ADAPTATION_SEED = 1
MEASUREMENTS = 1024
"""Number of measurements; a short validation text is passed several times, with other draws."""


def adapt_objective(
    objective: Objective,
    stream: TokenStream,
    score: Callable[[TrainBatch], Tensor],
    config: Config,
    *,
    device: torch.device,
    dp_rank: int = 0,
    dp_size: int = 1,
    dp_group: dist.ProcessGroup | None = None,
    interrupted: Callable[[], bool] = lambda: False,
) -> None:
    """Measure on the sequences of the evaluation, and adapt; each rank measures its batches.

    InterruptedEvaluation where `interrupted`, asked before each batch, says so.
    """
    size = config.evaluation.batch_size
    sequences = min(config.evaluation.sequences or MEASUREMENTS, stream.total_positions)
    passes = -(-MEASUREMENTS // sequences)
    batches = [(draw, start) for draw in range(passes) for start in range(0, sequences, size)]
    sums = []
    # ZeRO 3 needs the same number of forward passes on every rank: where batches run out, a rank
    # repeats the last one with weight 0.
    for number in range(dp_rank, -(-len(batches) // dp_size) * dp_size, dp_size):
        if interrupted():
            raise InterruptedEvaluation
        draw, start = batches[min(number, len(batches) - 1)]
        clean = clean_batch(stream.read(np.arange(start, start + size)))
        noise = NoiseKey(ADAPTATION_SEED, clean.position, draw)
        measured = objective.measure(clean, noise, lambda batch: score(batch.to(device)))
        sums.append(measured * float(number < len(batches)))
    total = torch.stack(sums).sum(dim=0).to(device)
    if dp_size > 1:
        dist.all_reduce(total, group=dp_group)
    objective.adapt(total.cpu())
