"""Base of all objectives: corruption before anything is sharded, a loss after the head.

An objective does not know the topology: its randomness is keyed by position, and `VocabChunk` does
its sums over the vocabulary. Adding one takes a file here, a YAML in `configs/objective/` and a
test.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from pretrain.batch import AttentionKind, AttentionRule, CleanBatch, TrainBatch
from pretrain.config.model import ModelConfig
from pretrain.config.objective_base import ObjectiveConfig
from pretrain.errors import ConfigError
from pretrain.noise.key import NoiseKey
from pretrain.noise.time import stratified_time
from pretrain.objectives.network_size import AuxiliaryNetwork
from pretrain.vocabulary import TokenSpace

if TYPE_CHECKING:
    from pretrain.config.samplers import AncestralConfig
    from pretrain.model.transformer import Transformer
    from pretrain.model.vocab import VocabChunk
    from pretrain.sampling.sampler import Sampler


class Objective(ABC):
    """One family: it corrupts tokens, names the targets and scores the predictions."""

    exact_likelihood: bool = False
    """True where the bound is the likelihood itself and needs no draws."""
    causal: ClassVar[bool] = False
    """True where attention is causal, for counting operations."""
    head_share: float = 1.0
    """Share of positions at which the head is evaluated, on average."""
    positions_per_token: float = 1.0
    """Positions that go through the layers for each token (2 for a pair of noisy and clean)."""
    extra_passes: float = 0.0
    """Extra forward passes without gradient in a training step (self-conditioning, a teacher)."""
    revises_tokens: ClassVar[bool] = False
    """True where sampling may change a token that has been drawn."""
    bound_parts: ClassVar[tuple[str, ...]] = ()
    """Names of the terms that the bound is reported in; () where it is one number."""
    adapts: bool = False
    """True where measurements during training change how it trains; `state` holds the result."""

    def __init__(
        self, config: ObjectiveConfig, space: TokenSpace, static_rows: bool = False
    ) -> None:
        """`static_rows` pads selected rows to one of `HEAD_CAPACITIES` sizes (compiled graphs)."""
        self.config = config
        self.space = space
        self.static_rows = static_rows

    @property
    def name(self) -> str:
        """Name of the family."""
        return self.config.name

    @property
    def teacher(self) -> bool:
        """True where it learns from a frozen copy of the model, by `teacher_loss`."""
        return self.config.teacher

    @property
    def time_window(self) -> int:
        """Number n of sequences over which noise levels are stratified.

        The first start of a run fills it in.
        """
        assert self.config.time_window is not None, "filled in before training or evaluation starts"
        return self.config.time_window

    def attention_kinds(self, documents_apart: bool) -> tuple[AttentionKind, ...]:
        """Types of attention rules in its batches, from which a run's kernels follow.

        The default is that of bidirectional families, which need `documents` also for a row that
        ends early.
        """
        return ("documents",) if documents_apart else ("bidirectional", "documents")

    @abstractmethod
    def corrupt(self, clean: CleanBatch, noise: NoiseKey) -> TrainBatch:
        """Make the training batch on the CPU; `noise` is keyed by the positions of `clean`."""

    def bound_batch(self, clean: CleanBatch, noise: NoiseKey) -> TrainBatch:
        """Make a batch whose weighted losses, summed by sequence, estimate the exact bound in nats.

        Weights are float64, and `noise` is keyed by the evaluation draw. Default: the training
        batch.
        """
        batch = self.corrupt(clean, noise)
        return TrainBatch(**{**batch.__dict__, "weight": batch.weight.double()})

    def auxiliary_network(self, model: Transformer, seed: int) -> Any:
        """Module with the weights that the objective adds to the transformer's, or None.

        It is called in place of the transformer, as `network(transformer, batch, exact)`, and names
        its `lr_scales`.
        """
        return None

    def auxiliary_size(self, model: ModelConfig, padded_vocab_size: int) -> AuxiliaryNetwork | None:
        """Weights and saved tensors of the auxiliary network, for the planner."""
        return None

    def auxiliary_parameters(self, model: ModelConfig, padded_vocab_size: int) -> int:
        """Number of weights of the auxiliary network, over all ranks."""
        size = self.auxiliary_size(model, padded_vocab_size)
        return 0 if size is None else size.parameters

    def measure(
        self, clean: CleanBatch, noise: NoiseKey, score: Callable[[TrainBatch], Tensor]
    ) -> Tensor:
        """Compute float64 sums over a batch for `adapt`; they add up over batches and ranks.

        `score` gives the bound of each row of a batch, float64 [b].
        """
        raise AssertionError(f"{self.name} does not adapt")

    def adapt(self, sums: Tensor) -> None:
        """Change `state` by the sums of `measure` over a sample of the validation text."""
        raise AssertionError(f"{self.name} does not adapt")

    @property
    def state(self) -> dict[str, Any]:
        """State as plain JSON, saved with every checkpoint and given back to `restore`."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Load the state of a checkpoint."""
        assert not state, f"{self.name} has no state"

    def token_loss(self, chunk: VocabChunk, targets: Tensor, extra: dict[str, Tensor]) -> Tensor:
        """Training loss of each target before weighting, float32 [n]."""
        return chunk.cross_entropy(targets)

    def sampler(self, settings: AncestralConfig) -> Sampler:
        """Make the sampler of the reverse process; raises ConfigError where there is none."""
        raise ConfigError(f"objective {self.name!r} has no sampler")

    def begins_round(self, position: int) -> bool:
        """True where a step that begins at `position` of the run needs a new teacher first."""
        raise AssertionError(f"{self.name} has no teacher")

    def teacher_loss(self, chunk: VocabChunk, taught: VocabChunk) -> Tensor:
        """Training loss of each position given the teacher's prediction there, float32 [n]."""
        raise AssertionError(f"{self.name} has no teacher")

    def token_bound(self, chunk: VocabChunk, targets: Tensor, extra: dict[str, Tensor]) -> Tensor:
        """Term of the exact bound of each target before weighting [n]. Default: the loss."""
        return self.token_loss(chunk, targets, extra)


def build_objective(
    config: ObjectiveConfig, space: TokenSpace, static_rows: bool = False
) -> Objective:
    """Build the objective of these settings."""
    family: type[Objective] = config.load()
    return family(config, space, static_rows)


def sequence_rows(batch_size: int, length: int) -> Tensor:
    """Row of the batch for each of its b * s flat positions, int64 [b * s]."""
    return torch.arange(batch_size).repeat_interleave(length)


def position_in_segment(segment: Tensor) -> Tensor:
    """Distance from the first position of the same segment, int64 [b, s]."""
    b, s = segment.shape
    index = torch.arange(s).expand(b, s)
    starts = torch.ones_like(segment, dtype=torch.bool)
    starts[:, 1:] = segment[:, 1:] != segment[:, :-1]
    return index - torch.where(starts, index, 0).cummax(dim=1).values


def document_positions(clean: CleanBatch) -> Tensor:
    """Position of each token in its sequence, or in its document where documents are kept apart."""
    if clean.one_segment:
        return torch.arange(clean.tokens.shape[1])[None]
    return position_in_segment(clean.segment)


def visible_attention(clean: CleanBatch) -> AttentionRule:
    """Bidirectional attention inside each document; an invalid position attends to itself only."""
    if clean.all_valid and clean.one_segment:
        return AttentionRule("bidirectional")
    return AttentionRule.from_documents(clean.segment, clean.valid, causal=False)


HEAD_CAPACITIES = 8
"""Static sizes of selected rows: multiples of an eighth of all positions."""


@dataclass(frozen=True)
class HeadRows:
    """Positions at which the head is evaluated; `take` gathers values [b, s'] there."""

    index: Tensor
    """Flat indices into [b * s'], int64 [n]."""
    real: Tensor
    """bool [n], False for rows that only fill up a static capacity."""

    def take(self, values: Tensor, filler: float) -> Tensor:
        """`values` [b, s'] at the rows [n], `filler` where a row is not real."""
        return torch.where(self.real, values.flatten()[self.index], filler)


def head_rows(wanted: Tensor, static: bool) -> HeadRows:
    """Rows where `wanted` [b, s'] is True: exactly these, or filled up to a static capacity.

    There is always at least one row, because a head needs one.
    """
    index = wanted.flatten().nonzero()[:, 0]
    capacity = max(1, len(index))
    if static:
        step = -(-wanted.numel() // HEAD_CAPACITIES)
        capacity = min(-(-capacity // step) * step, wanted.numel())
    real = torch.arange(capacity) < len(index)
    padded = torch.zeros(capacity, dtype=torch.int64)
    padded[: len(index)] = index
    return HeadRows(padded, real)


def shorten(clean: CleanBatch, noise: NoiseKey, share: float, pad_id: int) -> CleanBatch:
    """Truncate a keyed share of the sequences to a random length 1..s; the rest becomes padding.

    A bidirectional model otherwise sees one length only (SMDM and LLaDA truncate 1 % of samples).
    The loss is still divided by the number of tokens before truncation.
    """
    if share == 0:
        return clean
    s = clean.tokens.shape[1]
    u = noise.uniform("shorten", 2)
    length = torch.where(u[:, 0] < share, (u[:, 1] * s).long() + 1, s)
    valid = clean.valid & (torch.arange(s)[None] < length[:, None])
    return replace(
        clean,
        tokens=torch.where(valid, clean.tokens, pad_id),
        valid=valid,
        all_valid=bool(valid.all()),
    )


def fixed_count(clean: CleanBatch, noise: NoiseKey, window: int) -> tuple[Tensor, Tensor]:
    """Masks [b, s] of exactly m valid tokens, m stratified over 1..L, and the weights L / m [b].

    The expectation equals that of masking with probability t and weight 1/t; the variance is lower.
    """
    length = clean.valid.sum(dim=1)
    t = stratified_time(noise, window)
    count = torch.minimum((t * length).long() + 1, length)
    score = torch.where(clean.valid, noise.fine_uniform("mask", clean.valid.shape[1]), torch.inf)
    rank = score.argsort(dim=1).argsort(dim=1)
    mask = (rank < count[:, None]) & clean.valid
    return mask, length.double() / count.clamp(min=1)
