"""What every objective is: corruption before anything is split, a loss after the head.

An objective never learns the topology: randomness comes keyed by position, sums over the vocabulary
come through `VocabChunk`. Adding one is a file here, a YAML in `configs/objective/` and a test.
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
from pretrain.objectives.network_size import OwnNetwork
from pretrain.vocabulary import TokenSpace

if TYPE_CHECKING:
    from pretrain.config.samplers import AncestralConfig
    from pretrain.model.transformer import Transformer
    from pretrain.model.vocab import VocabChunk
    from pretrain.sampling.sampler import Sampler


class Objective(ABC):
    """One family: how tokens are corrupted, what the network is asked, how answers are scored."""

    exact_likelihood: bool = False
    """Whether the bound is the likelihood itself and needs no draws."""
    causal: ClassVar[bool] = False
    """Whether attention is causal, for counting operations."""
    head_share: float = 1.0
    """Share of positions at which the head is evaluated, on average."""
    positions_per_token: float = 1.0
    """Positions that go through the layers for each token (2 for a pair of noisy and clean)."""
    extra_passes: float = 0.0
    """Forward passes without gradient beside the one of a training step (self-conditioning, a
    teacher)."""
    revises_tokens: ClassVar[bool] = False
    """True where sampling may change a token that has been drawn."""
    bound_parts: ClassVar[tuple[str, ...]] = ()
    """Names of the parts that the bound is told apart into; () where it is one number."""

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
        """n, over which noise levels are stratified; the first start of a run fills it in."""
        assert self.config.time_window is not None, "filled in before training or evaluation starts"
        return self.config.time_window

    def attention_kinds(self, documents_apart: bool) -> tuple[AttentionKind, ...]:
        """Kinds of attention rules that its batches carry, to name the kernels of a run.

        Families that read in both directions: documents also where a row ends early.
        """
        return ("documents",) if documents_apart else ("bidirectional", "documents")

    @abstractmethod
    def corrupt(self, clean: CleanBatch, noise: NoiseKey) -> TrainBatch:
        """The training batch; `noise` is keyed by the positions of `clean`, both on the CPU."""

    def bound_batch(self, clean: CleanBatch, noise: NoiseKey) -> TrainBatch:
        """A batch whose weighted losses, summed per sequence, estimate its exact bound in nats.

        Weights are float64. Here `noise` is keyed by the evaluation draw. Default: as in training.
        """
        batch = self.corrupt(clean, noise)
        return TrainBatch(**{**batch.__dict__, "weight": batch.weight.double()})

    def own_network(self, model: Transformer, seed: int) -> Any:
        """A module for weights that the objective brings, or None. It is called in the place of
        the transformer, as `network(transformer, batch, exact)`, and names its `lr_scales`."""
        return None

    def own_size(self, model: ModelConfig, padded_vocab_size: int) -> OwnNetwork | None:
        """What that network holds and keeps, for the planner."""
        return None

    def own_parameters(self, model: ModelConfig, padded_vocab_size: int) -> int:
        """How many weights that network has, over all ranks."""
        own = self.own_size(model, padded_vocab_size)
        return 0 if own is None else own.parameters

    adapts: bool = False
    """Whether measurements during training change how it trains; `state` is what they changed."""

    def measure(
        self, clean: CleanBatch, noise: NoiseKey, score: Callable[[TrainBatch], Tensor]
    ) -> Tensor:
        """Float64 sums over a batch that add over batches and ranks, for `adapt`.

        `score` gives the bound of each row of a batch, float64 [b].
        """
        raise AssertionError(f"{self.name} does not adapt")

    def adapt(self, sums: Tensor) -> None:
        """Change `state` by the sums of `measure` over a sample of the validation text."""
        raise AssertionError(f"{self.name} does not adapt")

    @property
    def state(self) -> dict[str, Any]:
        """Plain JSON, saved with every checkpoint and given back to `restore`."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Take over the state of a checkpoint."""
        assert not state, f"{self.name} has no state"

    def token_loss(self, chunk: VocabChunk, targets: Tensor, extra: dict[str, Tensor]) -> Tensor:
        """Training loss of each target before weighting, float32 [n]."""
        return chunk.cross_entropy(targets)

    def sampler(self, settings: AncestralConfig) -> Sampler:
        """The family's reverse process; raises ConfigError where it has none."""
        raise ConfigError(f"objective {self.name!r} has no sampler")

    def begins_round(self, position: int) -> bool:
        """Whether a step that begins at `position` of the run needs a new teacher first."""
        raise AssertionError(f"{self.name} has no teacher")

    def teacher_loss(self, chunk: VocabChunk, taught: VocabChunk) -> Tensor:
        """Training loss of each position given what the teacher answers there, float32 [n]."""
        raise AssertionError(f"{self.name} has no teacher")

    def token_bound(self, chunk: VocabChunk, targets: Tensor, extra: dict[str, Tensor]) -> Tensor:
        """Term of the exact bound of each target before weighting [n]. Default: the loss."""
        return self.token_loss(chunk, targets, extra)


def build_objective(
    config: ObjectiveConfig, space: TokenSpace, static_rows: bool = False
) -> Objective:
    """The objective that these settings configure."""
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
    """Everybody reads everybody of the same document; invalid positions are read by nobody else."""
    if clean.all_valid and clean.one_segment:
        return AttentionRule("bidirectional")
    return AttentionRule.from_documents(clean.segment, clean.valid, causal=False)


HEAD_CAPACITIES = 8
"""Static sizes of selected rows: multiples of an eighth of all positions."""


@dataclass(frozen=True)
class HeadRows:
    """Positions at which the head is evaluated, and how values [b, s'] are taken there."""

    index: Tensor
    """Flat indices into [b * s'], int64 [n]."""
    real: Tensor
    """False for rows that only fill up a capacity, bool [n]."""

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
    """Cut a keyed share of the sequences to a random length 1..s by padding the rest.

    A bidirectional model otherwise sees one length only (1 % of samples in SMDM and LLaDA). The
    loss stays divided by the tokens that were delivered.
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

    The expectation is that of masking with probability t and weight 1/t, with less variance.
    """
    length = clean.valid.sum(dim=1)
    t = stratified_time(noise, window)
    count = torch.minimum((t * length).long() + 1, length)
    score = torch.where(clean.valid, noise.fine_uniform("mask", clean.valid.shape[1]), torch.inf)
    rank = score.argsort(dim=1).argsort(dim=1)
    mask = (rank < count[:, None]) & clean.valid
    return mask, length.double() / count.clamp(min=1)
