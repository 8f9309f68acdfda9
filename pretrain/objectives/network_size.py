"""Weights and saved tensors of an objective's auxiliary network, as numbers for the planner.

There are no torch modules here, so that a run is planned without building one. Tests compare the
numbers with the built network and with the tensors that autograd keeps for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Literal


@dataclass(frozen=True)
class AuxiliaryWeight:
    """One parameter tensor, over all ranks."""

    name: str
    """Name inside the network."""
    shape: tuple[int, ...]
    group: Literal["decayed", "kept", "scaled"]
    """Its group in `pretrain.training.parameter_groups`; `scaled` has a separate learning
    rate."""
    over_vocabulary: bool = False
    """True where tensor parallelism shards it, as it does the embedding."""

    @property
    def elements(self) -> int:
        """Number of elements."""
        return prod(self.shape)


@dataclass(frozen=True)
class AuxiliaryNetwork:
    """Weights, and bytes that a forward pass saves for its backward pass.

    In training such a network scores all rows at once.
    """

    weights: tuple[AuxiliaryWeight, ...]
    position_bytes: float
    """Bytes for each position, whatever the compute precision."""
    position_elements: float
    """Further elements for each position, in the compute precision."""
    sequence_bytes: float
    """Bytes for each sequence."""
    token_bytes: float
    """Bytes for each row of the vocabulary, which tensor parallelism shards."""
    fixed_bytes: float
    """Bytes for each pass."""

    @property
    def parameters(self) -> int:
        """Number of weights over all ranks."""
        return sum(weight.elements for weight in self.weights)


def embedding_diffusion(
    hidden_size: int, padded_vocab_size: int, size: int, frequencies: int, units: int
) -> AuxiliaryNetwork:
    """Numbers of `pretrain.model.embedding_diffusion`.

    It has embeddings of `size`, `frequencies` sinusoids of the noise level, and a learned schedule
    of `units` steps.
    """
    double, single = 8, 4
    return AuxiliaryNetwork(
        weights=(
            AuxiliaryWeight("embedding.weight", (padded_vocab_size, size), "scaled", True),
            AuxiliaryWeight("schedule.end_points", (2,), "scaled"),
            AuxiliaryWeight("schedule.steepness", (units,), "scaled"),
            AuxiliaryWeight("schedule.offset", (units,), "scaled"),
            AuxiliaryWeight("schedule.height", (units,), "scaled"),
            AuxiliaryWeight("enter.weight", (hidden_size, size), "decayed"),
            AuxiliaryWeight("remember.weight", (hidden_size, size), "decayed"),
            AuxiliaryWeight("tell.weight", (hidden_size, 2 * frequencies), "decayed"),
            AuxiliaryWeight("tell.bias", (hidden_size,), "kept"),
        ),
        # Clean, noisy and estimated embeddings, queries and means; norms and terms.
        position_bytes=5 * size * double + 2 * size * single + 6 * double,
        position_elements=2 * size,  # what the two input projections take
        sequence_bytes=4 * units * double,
        token_bytes=size * (double + single) + 2 * double,
        fixed_bytes=7 * units * double,
    )
