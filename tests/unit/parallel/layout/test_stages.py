"""Balance of pipeline stages against brute force over all contiguous partitions."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel.errors import LayoutError
from parallel.layout.stages import split_layers

costs = st.lists(st.integers(0, 20).map(float), min_size=1, max_size=7)


def worst(partition: list[range], layers: list[float], first: float, last: float) -> float:
    """Cost of the most expensive stage."""
    sums = [sum(layers[i] for i in stage) for stage in partition]
    sums[0] += first
    sums[-1] += last
    return max(sums)


@given(costs, st.integers(1, 5), st.integers(0, 30), st.integers(0, 30))
def test_no_other_partition_has_a_cheaper_worst_stage(layers, stages, first, last) -> None:
    if stages > len(layers):
        with pytest.raises(LayoutError):
            split_layers(layers, stages, first, last)
        return
    partition = split_layers(layers, stages, first, last)
    assert [i for stage in partition for i in stage] == list(range(len(layers)))
    assert all(len(stage) for stage in partition)
    best = min(
        worst(
            [range(a, b) for a, b in zip((0, *inner), (*inner, len(layers)), strict=True)],
            layers,
            first,
            last,
        )
        for inner in combinations(range(1, len(layers)), stages - 1)
    )
    assert worst(partition, layers, first, last) == best


def test_an_expensive_head_leaves_the_last_stage_fewer_layers() -> None:
    assert split_layers([1.0] * 8, 2) == [range(4), range(4, 8)]
    assert split_layers([1.0] * 8, 2, last_cost=4.0) == [range(6), range(6, 8)]
