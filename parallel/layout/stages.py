"""Layers of each pipeline stage: contiguous, the most expensive stage as cheap as possible.

The first stage embeds, the last one also computes head and loss; both costs count.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from parallel.errors import LayoutError


@dataclass(frozen=True)
class Stage:
    """Part of the model that a rank builds and runs."""

    first: bool
    """True if it embeds the tokens."""
    last: bool
    """True if it computes the loss."""
    layers: range
    """Transformer layers, by number in the whole model."""


def whole_model(num_layers: int) -> Stage:
    """Only stage of a layout without a pipeline."""
    return Stage(first=True, last=True, layers=range(num_layers))


def check_stages(num_layers: int, num_stages: int) -> None:
    """Refuse, by LayoutError, more stages than layers."""
    if num_layers < num_stages:
        raise LayoutError(
            f"parallel.pipeline_parallel_size {num_stages} is larger than model.num_layers "
            f"{num_layers}; every stage needs a layer"
        )


def split_layers(
    layer_costs: Sequence[float], num_stages: int, first_cost: float = 0.0, last_cost: float = 0.0
) -> list[range]:
    """Layers of every stage, at least one each, minimising the cost of the most expensive stage.

    Costs are in any common unit (operations per token, say); `first_cost` and `last_cost` are those
    of embedding and head. Among equals the earlier stages get more layers. Raises LayoutError for
    more stages than layers.
    """
    n = len(layer_costs)
    check_stages(n, num_stages)
    total = [0.0]
    for layer_cost in layer_costs:
        total.append(total[-1] + layer_cost)

    def cost(stage: int, start: int, stop: int) -> float:
        extra = (first_cost if stage == 0 else 0.0) + (
            last_cost if stage == num_stages - 1 else 0.0
        )
        return total[stop] - total[start] + extra

    # best[stop]: (cost of the most expensive stage so far, ends of stages), for layers before stop
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}
    for stage in range(num_stages):
        after: dict[int, tuple[float, tuple[int, ...]]] = {}
        for stop in range(stage + 1, n - (num_stages - 1 - stage) + 1):
            choices = [
                (max(worst, cost(stage, start, stop)), (*ends, stop))
                for start, (worst, ends) in best.items()
                if start < stop
            ]
            after[stop] = min(choices, key=lambda choice: (choice[0], [-c for c in choice[1]]))
        best = after
    ends = (0, *best[n][1])
    return [range(a, b) for a, b in pairwise(ends)]
