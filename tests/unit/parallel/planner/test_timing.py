"""Time of a step: pipeline bubbles, a perfect machine, recomputation."""

from __future__ import annotations

from dataclasses import replace

import pytest
from planner_cases import LAYERS, MACHINE, candidate, model

from parallel.layout.rules import Layout
from parallel.planner.plan import estimate


def test_bubble_of_even_stages_is_that_of_one_forward_one_backward() -> None:
    silent = replace(MACHINE, latency_us=0, nvlink_gbs=1e12, network_gbs=1e12)
    for stages, count in ((2, 8), (4, 16), (8, 8)):
        chosen = candidate(Layout(1, stages), num_microbatches=count)
        time = estimate(model(), chosen, silent).time
        passes = time.compute + time.bubble
        assert time.bubble / passes == pytest.approx((stages - 1) / (count + stages - 1))


def test_uneven_stages_wait_for_the_slowest() -> None:
    layers = (1.0,) * 7
    cost = model(num_layers=7, stage_costs=(layers, 0.0))
    plan = estimate(cost, candidate(Layout(1, 2)), MACHINE)
    assert plan.layers == (4, 3)
    even = estimate(model(), candidate(Layout(1, 2)), MACHINE)
    assert plan.time.compute == pytest.approx(even.time.compute)


def test_mfu_of_a_perfect_machine_is_one() -> None:
    perfect = replace(
        MACHINE, matrix_efficiency=1, memory_efficiency=1, memory_bandwidth_gbs=1e12,
        launch_us=0,
    )  # fmt: skip
    plan = estimate(model(), candidate(Layout()), perfect)
    assert plan.mfu == pytest.approx(1.0, rel=1e-6)


def test_full_recomputation_costs_a_third_more_and_keeps_the_input_only() -> None:
    whole = estimate(model(), candidate(Layout()), MACHINE)
    again = estimate(model(), candidate(Layout(), recompute="full"), MACHINE)
    assert again.time.compute == pytest.approx(4 / 3 * whole.time.compute)
    assert again.memory.activations == pytest.approx(whole.memory.activations / 5)
    assert again.memory.activations_without_recompute == whole.memory.activations
    half = estimate(
        model(), candidate(Layout(), recompute="full", recompute_layers=LAYERS // 2), MACHINE
    )
    between = (whole.memory.activations + again.memory.activations) / 2
    assert half.memory.activations == pytest.approx(between)
    assert half.time.compute == pytest.approx(7 / 6 * whole.time.compute)


def test_few_positions_wait_for_the_weights() -> None:
    small = estimate(model(seq_length=1), candidate(Layout(), micro_batch_size=1), MACHINE)
    assert small.mfu < 0.01


def test_days_and_hours() -> None:
    plan = estimate(model(), candidate(Layout(2, 1, 1, 8, True)), MACHINE)
    assert plan.days(plan.tokens_per_day) == pytest.approx(1)
    assert plan.gpu_hours(plan.tokens_per_day) == pytest.approx(24 * 16)
