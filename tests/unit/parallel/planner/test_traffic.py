"""Volumes of messages against known laws."""

from __future__ import annotations

from dataclasses import replace

import pytest
from planner_cases import HIDDEN, LAYERS, LENGTH, MACHINE, candidate, model

from parallel.layout.rules import Layout
from parallel.planner.plan import stages_of
from parallel.planner.traffic import (
    Messages,
    data_messages,
    pipeline_messages,
    seconds,
    tensor_messages,
)


def test_ring_volumes() -> None:
    elements, ring = 1_000_000, 15 / 16
    layout = Layout(data_parallel_size=16)

    def sent(stage: int, count: int = 4) -> float:
        chosen = candidate(layout, zero_stage=stage, num_microbatches=count)
        return data_messages(chosen, elements, 10).bytes / ring / elements

    assert sent(1) == 2 * 4 + 2  # gradients in float32 there and back, weights in bfloat16
    assert sent(2) == 4 * 2 * 4 + 2  # gradients after every micro-batch
    assert sent(3) == 4 * (2 * 2 + 4)
    assert data_messages(candidate(Layout()), elements, 10) == Messages()


def test_sequence_parallelism_gathers_inputs_once_more() -> None:
    plain, sequence = (candidate(Layout(4, 1, 1, 1, sp)) for sp in (False, True))
    stages = [stages_of(model(), c)[0] for c in (plain, sequence)]
    volumes = [
        tensor_messages(model(), c, s).bytes for c, s in zip((plain, sequence), stages, strict=True)
    ]
    hidden = 2 * LENGTH * 2 * HIDDEN * 3 / 4
    assert volumes[1] - volumes[0] == pytest.approx(2 * hidden * LAYERS)


def test_pipeline_sends_hidden_states_and_gradients() -> None:
    assert pipeline_messages(model(), candidate(Layout(1, 2))).bytes == 2 * (
        2 * LENGTH * 2 * HIDDEN
    )


def test_groups_across_nodes_share_the_network() -> None:
    message = Messages(1e9, 0.0)
    quiet = replace(MACHINE, latency_us=0)
    assert seconds(Messages(), quiet, 8, 1) == 0
    inside = seconds(Messages(1e9, 1e-9), quiet, 8, 1)
    assert inside == pytest.approx(1 / (400 * 0.7), rel=1e-6)
    assert seconds(replace(message, count=1), quiet, 2, 8) == pytest.approx(8 * inside)
    assert seconds(replace(message, count=1), quiet, 16, 1) == pytest.approx(inside)
