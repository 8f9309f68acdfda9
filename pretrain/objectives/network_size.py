"""What a network that an objective brings of its own holds and keeps, as numbers for the planner.

Free of torch modules, so that a run is planned without building one; tests compare the numbers with
the built network and with what autograd keeps for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class OwnWeight:
    """One parameter, over all ranks."""

    elements: int
    group: Literal["decayed", "kept", "scaled"]
    """Its group in `pretrain.training.parameter_groups`; `scaled` has a rate of its own."""
    over_vocabulary: bool = False
    """Whether tensor parallelism cuts it, as it does the embedding."""


@dataclass(frozen=True)
class OwnNetwork:
    """Weights, and bytes that a forward pass leaves for its backward pass. In training such a
    network scores all rows at once."""

    weights: tuple[OwnWeight, ...]
    position_bytes: float
    """For each position, in any precision."""
    position_elements: float
    """For each position, further elements in the compute precision."""
    sequence_bytes: float
    token_bytes: float
    """For each row of the vocabulary; tensor parallelism cuts them."""
    fixed_bytes: float

    @property
    def parameters(self) -> int:
        """Weights over all ranks."""
        return sum(weight.elements for weight in self.weights)


def embedding_diffusion(
    hidden_size: int, padded_vocab_size: int, size: int, frequencies: int, units: int
) -> OwnNetwork:
    """Of `pretrain.model.embedding_diffusion`: embeddings of `size`, `frequencies` sinusoids of the
    noise level, a learned schedule of `units` steps."""
    double, single = 8, 4
    return OwnNetwork(
        weights=(
            OwnWeight(padded_vocab_size * size, "scaled", over_vocabulary=True),
            OwnWeight(2, "scaled"),  # the schedule's end points
            *[OwnWeight(units, "scaled")] * 3,
            *[OwnWeight(hidden_size * size, "decayed")] * 2,  # ways in, for the points and memory
            OwnWeight(hidden_size * 2 * frequencies, "decayed"),
            OwnWeight(hidden_size, "kept"),
        ),
        # Clean, noisy and estimated embeddings, queries and means; norms and terms.
        position_bytes=5 * size * double + 2 * size * single + 6 * double,
        position_elements=2 * size,  # what goes into the two ways in
        sequence_bytes=4 * units * double,
        token_bytes=size * (double + single) + 2 * double,
        fixed_bytes=7 * units * double,
    )
