"""Models of 1.7B, 10B and 70B on 512 ranks that exist on the meta device only.

What each rank would hold divides evenly, adds up to the whole model, is what the planner says, and
fits the GPU by the planner's account. Ranks differ by tensor and pipeline coordinate alone; the
fast suite builds the first and the last tensor rank of every stage for one data rank, and the very
last rank to see that it is no different. The slow suite builds all 512.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import pytest
from harness import run_ranks
from shards import Shapes, elements, every_rank, shards

from parallel.layout.rules import Layout
from parallel.planner.candidate import Candidate
from parallel.planner.plan import estimate, search, stages_of
from pretrain.config.optimizers import AdamWConfig
from pretrain.model.size import parameter_count
from pretrain.planning.ladder import VOCABULARY, ladder_config
from pretrain.planning.plan import costs, load_machine, search_space

MACHINE = load_machine("h100x512")
BATCH = 1024
LAYOUTS = {
    "1.7b": Layout(1, 4, 1, 128),
    "10b": Layout(4, 2, 1, 64, True),
    "70b": Layout(8, 8, 1, 8, True),
}


def candidate(layout: Layout) -> Candidate:
    """One sequence a micro-batch, cheap recomputation."""
    count = BATCH // layout.data_parallel_size
    return Candidate(layout, 1, 1, count, AdamWConfig().spec(), recompute="selective")


@cache
def built(name: str, layout: Layout) -> dict[str, Any]:
    """Shapes at the coordinates that the fast suite builds."""
    model = ladder_config(name).model.model_dump()
    return run_ranks(1, shards, layout, model, VOCABULARY)[0]


def check(name: str, chosen: Candidate, found: dict[tuple[int, int], Shapes]) -> None:
    """All properties of the shards of a layout, keyed by (pipeline, tensor) rank."""
    config = ladder_config(name)
    model, tp = costs(config, VOCABULARY), chosen.layout.tensor_parallel_size
    whole: dict[str, int] = {}
    for (stage, rank), shapes in found.items():
        assert shapes == found[stage, 0], f"stage {stage} differs on tensor rank {rank}"
        for parameter, (size, dim) in shapes.items():
            full = math.prod(size) * (tp if dim is not None else 1)
            assert whole.setdefault(parameter, full) == full, f"{parameter} differs between stages"
    padded = config.model.padded_vocab_size(VOCABULARY)
    assert sum(whole.values()) == parameter_count(config.model, padded)
    for number, stage_parts in enumerate(stages_of(model, chosen)):
        planned = sum(weight.held(tp) for weight in stage_parts.weights())
        assert elements(found[number, 0]) == planned, f"stage {number}"
    plan = estimate(model, chosen, MACHINE)
    assert plan.fits, f"{plan.memory.total / 2**30:.1f} GiB of {MACHINE.memory_gib}"


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_shard_divides_adds_up_and_fits(name: str) -> None:
    result = built(name, LAYOUTS[name])
    assert result["alike"], "the last data rank holds other shapes"
    check(name, candidate(LAYOUTS[name]), result["found"])


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_best_layout_of_the_planner_can_be_built(name: str) -> None:
    config = ladder_config(name)
    best = search(costs(config, VOCABULARY), MACHINE, search_space(config, MACHINE)).fitting[0]
    check(name, best.candidate, built(name, best.candidate.layout)["found"])


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_each_of_the_512_ranks(name: str) -> None:
    model = ladder_config(name).model.model_dump()
    by_rank: list[tuple[tuple[int, int], Shapes]] = run_ranks(
        1, every_rank, LAYOUTS[name], model, VOCABULARY, timeout=600
    )[0]
    assert len(by_rank) == 512
    found = dict(by_rank)
    assert all(shapes == found[place] for place, shapes in by_rank)
    check(name, candidate(LAYOUTS[name]), found)


def test_a_missing_matrix_is_seen() -> None:
    """The checks above can fail."""
    layout = LAYOUTS["1.7b"]
    found = {place: dict(shapes) for place, shapes in built("1.7b", layout)["found"].items()}
    del found[3, 0]["layers.27.mlp.down.weight"]
    with pytest.raises(AssertionError):
        check("1.7b", candidate(layout), found)
