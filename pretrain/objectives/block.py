"""Block diffusion (BD3-LM, arXiv 2503.09573): left to right over blocks, masked inside a block.

    input     [xt | x0], 2 S positions: a noisy block attends to itself and to the clean blocks
              before it (the picture is in `pretrain.objectives.attention_order`)
    training  sum over blocks b, masked l in b, of CE / t_b   (`loss: elbo`)   or of CE   (`simple`)
    bound     -log p(x) <= sum_b E_m (|b| / m) sum over a random set of m tokens of b, of CE

Blocks of 1 token are autoregressive (the bound is the likelihood itself), one block of S tokens is
masked diffusion; the bound becomes tighter as blocks become smaller. Each block draws a separate t,
stratified over the blocks of the window.

In training t_b is uniform on `clip` = [low, high]. A narrower interval lowers the variance, at the
price of a loss that is no longer the bound; for blocks of 1 token [1, 1] removes all variance.
`adapt_clip` moves the interval to the one of least measured variance at every evaluation.
`clip_masks` clips the share of a block that is masked as well, as the published code does by
drawing again. The weights do not change, so that this is not the bound restricted to fewer levels.
The evaluated bound is never clipped.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pretrain.batch import AttentionKind, CleanBatch, TrainBatch
from pretrain.config.objectives import BlockConfig
from pretrain.errors import ConfigError
from pretrain.noise.key import NoiseKey
from pretrain.noise.time import stratified_times
from pretrain.objectives.attention_order import pair
from pretrain.objectives.base import (
    Objective,
    document_positions,
    head_rows,
)
from pretrain.objectives.clipping import (
    Interval,
    allowed_counts,
    best_interval,
    candidate_intervals,
    count_weights,
    draw_counts,
    interval_sums,
)
from pretrain.vocabulary import TokenSpace

if TYPE_CHECKING:
    from pretrain.config.samplers import AncestralConfig
    from pretrain.module import ObjectiveModule
    from pretrain.sampling.sampler import Sampler


class Block(Objective):
    """Masked diffusion inside blocks, in one pass over the noisy and the clean sequence."""

    config: BlockConfig

    positions_per_token = 2.0

    def __init__(self, config: BlockConfig, space: TokenSpace, static_rows: bool = False) -> None:
        super().__init__(config, space, static_rows)
        self.exact_likelihood = config.block_size == 1
        self.interval = config.clip
        self.adapts = config.adapt_clip
        self.head_share = sum(config.clip) / 2
        if config.clip_masks:
            refuse_impossible_shares(config)

    def attention_kinds(self, documents_apart: bool) -> tuple[AttentionKind, ...]:
        """Columns for every batch."""
        return ("columns",)

    def sampler(self, settings: AncestralConfig) -> Sampler:
        """Draw block by block; each block takes its share of the steps."""
        from pretrain.sampling.ordered import sample_block
        from pretrain.sampling.sampler import Drawn, Sampler

        def draw(module: ObjectiveModule, prompt: Tensor, noise: NoiseKey, length: int) -> Drawn:
            size = self.config.block_size
            return sample_block(
                module.model,
                prompt,
                noise,
                block_size=size,
                steps=-(-(settings.steps or length) // -(-length // size)),
                length=length,
                temperature=settings.temperature,
                top_p=settings.top_p,
            )

        return Sampler("block", draw)

    def corrupt(self, clean: CleanBatch, noise: NoiseKey) -> TrainBatch:
        """Mask each token of a block with the probability t of that block."""
        block = self._blocks(clean)
        t = self._times(noise, block, self.interval)
        if self.config.clip_masks:
            each = t[:, :: self.config.block_size]  # the level of each block
            size = self._sizes(clean, block)
            number = draw_counts(size, each, self.interval, noise.uniform("count", each.shape[1]))
            mask = self._choose(clean, block, size, number, noise)
        else:
            mask = (noise.uniform("mask", block.shape[1]) < t) & clean.valid
        return self._batch(clean, block, mask, self._weight(t).float())

    def bound_batch(self, clean: CleanBatch, noise: NoiseKey) -> TrainBatch:
        """Mask exactly m tokens of each block, m stratified over 1..|b|; weight |b| / m."""
        block = self._blocks(clean)
        count = int(block[0, -1]) + 1
        t = stratified_times(noise, self.time_window, count)
        size = self._sizes(clean, block)
        number = torch.minimum((t * size).floor() + 1.0, size)
        mask = self._choose(clean, block, size, number, noise)
        return self._batch(clean, block, mask, (size / number.clamp(min=1.0)).gather(1, block))

    def measure(
        self, clean: CleanBatch, noise: NoiseKey, score: Callable[[TrainBatch], Tensor]
    ) -> Tensor:
        """Sum losses of one keyed block of each row, at noise levels that are not clipped.

        All blocks of a row are noised, so that the input looks as in training; only the weights of
        the chosen block are above 0, so that the score of a row is the mean loss of that block.
        """
        block = self._blocks(clean)
        count = int(block[0, -1]) + 1
        t = self._times(noise, block, (0.0, 1.0))
        mask = (noise.uniform("mask", block.shape[1]) < t) & clean.valid
        chosen = (noise.uniform("probe", 1) * count).long()
        probed = (block == chosen) & clean.valid
        size = probed.sum(dim=1, keepdim=True)
        weight = torch.where(probed, self._weight(t) / size.clamp(min=1), 0.0)
        loss = score(self._batch(clean, block, mask, weight)).cpu()
        level = t.gather(1, (block == chosen).int().argmax(dim=1, keepdim=True))[:, 0]
        present = size[:, 0] > 0  # a chosen block can lie in the invalid tail of a row
        if not self.config.clip_masks or not present.any():
            return interval_sums(level[present], loss[present])
        number = (probed & mask).sum(dim=1)[present]
        weight = count_weights(size[present, 0].double(), level[present], number)
        return interval_sums(level[present], loss[present], weight)

    def adapt(self, sums: Tensor) -> None:
        """Move to the interval of least variance."""
        self.interval = best_interval(sums)

    @property
    def state(self) -> dict[str, Any]:
        """Interval that is in use."""
        return {"interval": list(self.interval)} if self.adapts else {}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue with the interval of a checkpoint."""
        if self.adapts and state:
            low, high = state["interval"]
            if not 0 <= low < high <= 1:
                raise ValueError(f"objective.interval: {low}, {high}")
            self.interval = (low, high)

    def _times(self, noise: NoiseKey, block: Tensor, interval: Interval) -> Tensor:
        """Level of each position's block, uniform on `interval`, float64 [b, s]."""
        low, high = interval
        t = stratified_times(noise, self.time_window, int(block[0, -1]) + 1)
        return (low + (high - low) * t).gather(1, block)

    def _sizes(self, clean: CleanBatch, block: Tensor) -> Tensor:
        """Valid tokens of each block, float64 [b, blocks]."""
        sizes = torch.zeros(len(block), int(block[0, -1]) + 1, dtype=torch.float64)
        return sizes.scatter_add_(1, block, clean.valid.double())

    def _choose(
        self, clean: CleanBatch, block: Tensor, size: Tensor, number: Tensor, noise: NoiseKey
    ) -> Tensor:
        """Masks [b, s] of exactly `number` random valid tokens of each block [b, blocks]."""
        # A key is the block plus a uniform in (0, 1): positions sort by block, and at random inside
        # a block; invalid ones come last. The rank of a position less the valid tokens of earlier
        # blocks is its rank inside its block.
        key = block + noise.fine_uniform("mask", block.shape[1])
        rank = torch.where(clean.valid, key, torch.inf).argsort(dim=1).argsort(dim=1)
        before = (size.cumsum(dim=1) - size).gather(1, block)
        return (rank - before < number.gather(1, block)) & clean.valid

    def _weight(self, t: Tensor) -> Tensor:
        return 1.0 / t if self.config.loss == "elbo" else torch.ones_like(t)

    def _blocks(self, clean: CleanBatch) -> Tensor:
        """Block of each position, int64 [b, s]."""
        b, s = clean.tokens.shape
        return (torch.arange(s) // self.config.block_size).expand(b, s)

    def _batch(self, clean: CleanBatch, block: Tensor, mask: Tensor, weight: Tensor) -> TrainBatch:
        """Assemble the pair for masked positions and weights [b, s]."""
        s = mask.shape[1]
        noisy = torch.where(mask, self.space.mask_id, clean.tokens)
        rows = head_rows(torch.cat((mask, torch.zeros_like(mask)), dim=1), self.static_rows)
        return TrainBatch(
            ids=torch.cat((noisy, clean.tokens), dim=1),
            positions=document_positions(clean).repeat(1, 2),
            attention=pair(clean, block).rule(),
            noise_level=None,
            rows=rows.index,
            targets=rows.take(clean.tokens.repeat(1, 2), self.space.doc_id),
            weight=rows.take(weight.repeat(1, 2), 0.0),
            sequence=rows.index // (2 * s),
        )


def refuse_impossible_shares(config: BlockConfig) -> None:
    """Raise ConfigError where no number of masked tokens gives a share of a block inside `clip`."""
    size = config.block_size
    given = [config.clip, *(candidate_intervals() if config.adapt_clip else [])]
    for low, high in given:
        counts = allowed_counts(torch.tensor(float(size)), (low, high)).nonzero()[:, 0] / size
        if low - 1e-9 <= float(counts[0]) and float(counts[-1]) <= high + 1e-9:
            continue
        raise ConfigError(
            f"objective.clip_masks is true, but no number of masks among block_size {size} tokens "
            f"is a share in [{low:g}, {high:g}]; widen objective.clip, take larger blocks, or set "
            "clip_masks (at blocks of one token also adapt_clip) to false"
        )
