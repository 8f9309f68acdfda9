"""Batches: clean tokens from the data pipeline, and the corrupted batch that trains the model.

An objective turns a `CleanBatch` into a `TrainBatch` before anything is sharded over ranks; nothing
downstream of it knows which objective ran. Both are plain frozen values of static shape.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

AttentionKind = Literal["causal", "bidirectional", "documents", "columns"]


@dataclass(frozen=True)
class CleanBatch:
    """Clean sequences of the run, as the data pipeline delivered them.

    Positions whose `valid` is False (the tail of the budget, and the rows that fill up the run's
    last batch) hold pad. They are never attended to, noised or counted.
    """

    tokens: Tensor
    """x0, int64 [b, s]."""
    position: Tensor
    """Global sample position g of the run, int64 [b]. Every random draw is keyed by it."""
    segment: Tensor
    """Document number inside the sequence, int32 [b, s]; all 0 when documents are packed."""
    valid: Tensor
    """bool [b, s]."""
    all_valid: bool
    """True where `valid` is True everywhere, known on the host to avoid a synchronisation."""
    one_segment: bool = True
    """True where `segment` is 0 everywhere, known on the host."""

    def to(self, device: torch.device) -> CleanBatch:
        """Copy the batch to `device`, asynchronously from pinned memory."""
        return replace(
            self,
            tokens=self.tokens.to(device, non_blocking=True),
            position=self.position.to(device, non_blocking=True),
            segment=self.segment.to(device, non_blocking=True),
            valid=self.valid.to(device, non_blocking=True),
        )


@dataclass(frozen=True)
class Documents:
    """Bounds of documents that are separate for attention, as variable-length kernels take them."""

    starts: Tensor
    """Start of each document among the b * s' flat positions, then b * s'; int32 [n + 1]."""
    longest: int
    """Length of the longest document."""
    causal: bool
    """True where a position attends only to itself and to earlier ones of its document."""


@dataclass(frozen=True)
class AttentionRule:
    """Attention mask of a batch, as columns instead of a tensor of pairs.

    Query q attends to key k iff both have the same segment, and either the same group or
    key_rank[k] < query_rank[q]. With `hiding`, a query misses each key of the latter kind with a
    probability of the query. `columns` carries int32 [4 or 6, b, s'] in the order segment, group,
    query_rank, key_rank (, hiding, salt).

    Three kinds of rules are fast paths: `causal` and `bidirectional` have no columns, `documents`
    has columns that are equivalent to its bounds.
    """

    kind: AttentionKind
    columns: Tensor | None = None
    documents: Documents | None = None

    @staticmethod
    def from_documents(segment: Tensor, valid: Tensor, *, causal: bool) -> AttentionRule:
        """Build the rule of separate documents, one for each run of equal `segment`.

        A position that is not `valid` attends to itself only. Both tensors are [b, s] on the CPU,
        where counting the documents does not wait for a device.
        """
        starts = torch.ones_like(valid)
        starts[:, 1:] = (segment[:, 1:] != segment[:, :-1]) | ~valid[:, 1:] | ~valid[:, :-1]
        bounds = torch.cat((starts.flatten().nonzero()[:, 0], torch.tensor([starts.numel()])))
        document = starts.cumsum(dim=1)
        place = torch.arange(segment.shape[1]).expand_as(document)
        place = place if causal else torch.zeros_like(place)
        rule = AttentionRule.from_columns(document, place, place, place)
        longest = int(bounds.diff().max())
        documents = Documents(bounds.to(torch.int32), longest, causal)
        return AttentionRule("documents", rule.columns, documents)

    @staticmethod
    def from_columns(
        segment: Tensor,
        group: Tensor,
        query_rank: Tensor,
        key_rank: Tensor,
        hiding: tuple[Tensor, Tensor] | None = None,
    ) -> AttentionRule:
        """Build the general rule; every argument is an integer tensor [b, s'].

        `hiding` is (probability times 2^31, keyed 31-bit word) of each query.
        """
        every = (segment, group, query_rank, key_rank, *(hiding or ()))
        return AttentionRule("columns", torch.stack([c.to(torch.int32) for c in every]))

    @cached_property
    def _dense(self) -> Tensor:
        if self.columns is None:
            raise ValueError(f"attention rule {self.kind!r} has no columns; it is a fast path")
        segment, group, query_rank, key_rank, *hiding = self.columns
        same = segment[:, :, None] == segment[:, None, :]
        together = group[:, :, None] == group[:, None, :]
        earlier = key_rank[:, None, :] < query_rank[:, :, None]
        if hiding:
            threshold, salt = hiding
            key = torch.arange(segment.shape[1], device=segment.device)
            earlier &= keyed_hash(salt[:, :, None].long(), key) >= threshold[:, :, None]
        return (same & (together | earlier))[:, None]

    def mask(self) -> Tensor:
        """Dense boolean mask [b, 1, s', s'], True where a query (row) attends to a key (column).

        It is built once a batch, not once a layer.
        """
        return self._dense


def keyed_hash(salt: Tensor, key: Tensor) -> Tensor:
    """Hash (salt, key) to 31 bits, int64, equal on every device (the finaliser of MurmurHash3)."""
    word = 0xFFFFFFFF
    h = (salt + (key + 1) * 0x9E3779B9) & word
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        h = ((h ^ (h >> shift)) * factor) & word
    return (h ^ (h >> 16)) >> 1


@dataclass(frozen=True)
class TrainBatch:
    """A corrupted batch: inputs of the first pipeline stage, of every stage and of the last one.

    `rows` selects the positions at which the head is evaluated; the fields of the last group are
    aligned with it ([n] each). Rows that only fill up a static capacity carry weight 0.
    """

    # first stage
    ids: Tensor
    """Network input, int64 [b, s'], or with `mix` [b, s', k]."""
    # every stage
    positions: Tensor
    """Position of each token inside its document or sequence, int64 [b, s'], or
    [1, s'] when every row has the same (rotary phase)."""
    attention: AttentionRule
    noise_level: Tensor | None
    """Noise level sigma_t of a noise-conditioned model, float32 [b]; None for other models."""
    # last stage
    rows: Tensor | None
    """Flat indices into [b * s'] at which the head is evaluated, int64 [n]; None for all."""
    targets: Tensor
    """Token to predict, int64 [n]."""
    weight: Tensor
    """Per-target weight [n]: float32 in a training batch, float64 in a batch for the exact bound.
    Rows that only fill up a static capacity carry 0."""
    sequence: Tensor
    """Row of the batch that each target belongs to, int64 [n]: sums per sequence by `index_add`."""
    mix: Tensor | None = None
    """Weights of the k embeddings whose sum an input is, float32 [b, s', k] (first stage); None
    where every input is one token."""
    teacher: dict[str, Tensor] = field(default_factory=dict)
    """Inputs of a teacher: `ids` [b, s'] and `noise_level` [b]; empty where there is none."""
    extra: dict[str, Tensor] = field(default_factory=dict)
    """Further inputs of a family's loss, each aligned with `targets` in its first dimension."""
    dropout_seed: int | None = None
    """Key of every dropout mask of this micro-batch; None drops nothing."""
    auxiliary: dict[str, Any] = field(default_factory=dict)
    """Inputs of an objective's auxiliary network: tensors of any shape, attention rules."""

    def to(self, device: torch.device) -> TrainBatch:
        """Copy the batch to `device`; a GPU copies it in the background."""
        # From pageable memory CUDA would copy synchronously, whatever non_blocking says.
        batch = self.pin() if device.type == "cuda" else self
        return batch._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin(self) -> TrainBatch:
        """Copy the batch to page-locked memory (needs CUDA); tensors on a device stay there."""
        return self._each(lambda tensor: tensor if tensor.is_cuda else tensor.pin_memory())

    def _each(self, change: Callable[[Tensor], Tensor]) -> TrainBatch:
        def changed(value: Any) -> Any:
            if isinstance(value, Tensor):
                return change(value)
            if isinstance(value, AttentionRule):
                documents = value.documents
                if documents is not None:
                    documents = replace(documents, starts=changed(documents.starts))
                return AttentionRule(value.kind, changed(value.columns), documents)
            if isinstance(value, dict):
                return {name: changed(tensor) for name, tensor in value.items()}
            return value

        return TrainBatch(**{k: changed(v) for k, v in self.__dict__.items()})
