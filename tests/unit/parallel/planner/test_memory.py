"""Memory of a rank: what the degrees divide, what offloading moves, what logits take."""

from __future__ import annotations

from dataclasses import replace

import pytest
from planner_cases import HIDDEN, LENGTH, MACHINE, candidate, model

from parallel.layout.rules import Layout
from parallel.planner.costs import Loss, Saved, Weight
from parallel.planner.memory import saved_bytes, stage_memory
from parallel.planner.offload import offload_seconds, pinned
from parallel.planner.plan import estimate, estimate_stages, stages_of
from parallel.planner.state import state_bytes


def test_degrees_divide_what_they_should() -> None:
    saved = (Saved(8, "tensor"), Saved(4, "sequence"), Saved(2, "whole"), Saved(1, "whole", 4))
    assert saved_bytes(saved, 10, candidate(Layout())) == 10 * (2 * 14 + 4)
    assert saved_bytes(saved, 10, candidate(Layout(2))) == 10 * (2 * 10 + 4)
    with_sequence = candidate(Layout(2, sequence_parallel=True))
    assert saved_bytes(saved, 10, with_sequence) == 10 * (2 * 8 + 4)
    assert saved_bytes((Saved(3, fixed=True),), 10, candidate(Layout())) == 6
    context = candidate(Layout(context_parallel_size=2))
    tensors = (Saved(1, under="context"), Saved(5, under="alone"), Saved(2, gathered=True))
    assert saved_bytes(tensors, 10, context) == 10 * 2 * (1 + 4)


def test_early_stages_hold_more_micro_batches() -> None:
    plans = estimate_stages(model(), candidate(Layout(1, 4)))
    sizes = [plan.activations for plan in plans]
    assert [size / sizes[-1] for size in sizes] == [4, 3, 2, 1]
    few = estimate_stages(model(), candidate(Layout(1, 4), num_microbatches=2))
    assert few[0].activations == 2 * few[3].activations


def test_a_tied_embedding_is_on_both_ends_and_counted_once_on_one() -> None:
    first, last = (
        sum(w.elements for w in stage.weights())
        for stage in stages_of(model(), candidate(Layout(1, 2)))
    )
    assert first + last == model().parameters + 64 * HIDDEN
    only = stages_of(model(), candidate(Layout()))[0]
    assert sum(w.elements for w in only.weights()) == model().parameters


def test_sharding_divides_optimizer_gradients_and_weights_in_turn() -> None:
    weights = (Weight(2**20, False),)
    layout = Layout(data_parallel_size=8)
    one, two, three = (
        state_bytes(weights, candidate(layout, zero_stage=stage)) for stage in (1, 2, 3)
    )
    assert one.optimizer == two.optimizer == three.optimizer == 12 * 2**17 + 4
    assert two.gradients == three.gradients == 4 * 2**17
    assert one.gradients == 6 * 2**20
    assert one.parameters == two.parameters == 8 * three.parameters == 2 * 2**20
    assert state_bytes(weights, candidate(layout, averages=1)).averages == 4 * 2**17


def test_overlap_takes_a_second_bucket_and_none_below_the_largest_tensor() -> None:
    small, large = 1000, 4 * HIDDEN**2
    for bucket, held in ((small, large), (10 * large, 10 * large)):
        chosen = candidate(Layout(data_parallel_size=4), zero_stage=2, reduce_bucket_size=bucket)
        apart = estimate_stages(model(), chosen)[0].state
        beside = replace(chosen, overlap_comm=True)
        overlapped = estimate_stages(model(), beside)[0].state
        assert overlapped.gathered - apart.gathered == 2 * (2 * held - bucket)
        assert replace(overlapped, gathered=apart.gathered) == apart


def test_offloading_takes_the_optimizer_out_of_the_sum() -> None:
    layout = Layout(data_parallel_size=4)
    for stage in (1, 2, 3):
        here, away = (
            estimate_stages(model(), candidate(layout, zero_stage=stage, offload=o, averages=1))[0]
            for o in ("none", "cpu")
        )
        state = away.state
        held = state.parameters + state.gradients
        assert away.total == held + away.activations + away.workspace + state.gathered
        assert state.optimizer + state.averages == here.state.optimizer + here.state.averages
        assert state.host > state.optimizer + state.averages
    assert candidate(Layout(), precision="float32", offload="cpu").effective_stage == 1


def test_pinned_memory_comes_in_powers_of_two() -> None:
    assert [pinned(n) for n in (0, 1, 2, 3, 2**20, 2**20 + 1)] == [0, 1, 2, 4, 2**20, 2**21]


def test_what_a_node_holds_decides_whether_it_fits() -> None:
    chosen = candidate(Layout(data_parallel_size=16), zero_stage=3, offload="cpu")
    plan = estimate(model(), chosen, MACHINE)
    assert plan.fits
    assert plan.host_bytes == 8 * plan.memory.state.host
    short = replace(MACHINE, host_memory_gib=plan.host_bytes / 2**30 + 0.9, host_reserved_gib=1)
    assert not estimate(model(), chosen, short).fits


def test_offloading_costs_the_ways_and_the_update_on_the_host() -> None:
    """By hand: gradients in float32 down, weights in bfloat16 up, 44 bytes of host traffic."""
    layout, one = Layout(data_parallel_size=16), 1e9
    exact = replace(
        MACHINE, network_efficiency=1, memory_efficiency=1, pcie_gbs=10, host_bandwidth_gbs=160
    )
    share = one / 16
    flat = candidate(layout, zero_stage=2, offload="cpu", num_microbatches=4)
    seconds, moved = offload_seconds(flat, exact, int(one), 8)
    assert moved == share * 6
    assert seconds == pytest.approx(share * (6 / 10e9 + 44 / 20e9))
    whole = replace(flat, zero_stage=3)
    seconds, moved = offload_seconds(whole, exact, int(one), 8)
    assert moved == share * (2 * 2 * 4 + 4 * 4 + 3 * 4)
    assert offload_seconds(replace(flat, offload="none"), exact, int(one), 8) == (0, 0)
    lighter, _ = offload_seconds(flat, exact, int(one), 4)
    assert lighter == pytest.approx(share * (6 / 10e9 + 36 / 20e9))


def test_a_teacher_costs_its_weights() -> None:
    chosen = candidate(Layout(data_parallel_size=4))
    plain, taught = (estimate_stages(model(teacher=t), chosen)[0].total for t in (False, True))
    assert taught - plain == 2 * model().parameters


def test_total_is_the_larger_of_backward_and_update() -> None:
    stage = stages_of(model(), candidate(Layout()))[0]
    memory = stage_memory(model(), candidate(Layout()), stage, 0)
    state = memory.state
    held = state.parameters + state.optimizer + state.gradients
    assert memory.total == held + max(memory.activations + memory.workspace, state.update)


def test_logits_are_whole_or_in_chunks_that_leave_a_gradient() -> None:
    rows = 2 * LENGTH
    whole = Loss(1000, HIDDEN, None, 4 * 1000 * rows, 4 * 1000 * 100)
    chunked = replace(whole, whole_bytes=4 * 1000 * rows - 1)
    assert whole.rows_at_once(rows, 1) == rows
    assert chunked.rows_at_once(rows, 1) == 100
    assert chunked.rows_at_once(rows, 2) == rows, "half the columns fit"
    kept = [
        stages_of(model(loss=loss), candidate(Layout()))[0].kept(candidate(Layout()))
        for loss in (whole, chunked)
    ]
    assert kept[0] - kept[1] == 4 * 1000 * (rows - HIDDEN)
