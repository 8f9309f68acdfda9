"""The planner's arithmetic: schedules, volumes and search against brute force and known laws."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import pytest

from parallel.engine.optimizer import OptimizerSpec, StateTensor
from parallel.errors import LayoutError
from parallel.layout.rules import Layout, check_layout
from parallel.planner.candidate import Candidate
from parallel.planner.costs import Loss, ModelCost, Part, Saved, Weight
from parallel.planner.machine import Machine
from parallel.planner.memory import saved_bytes, stage_memory
from parallel.planner.offload import offload_seconds, pinned
from parallel.planner.plan import Space, divisors, estimate, estimate_stages, search, stages_of
from parallel.planner.state import state_bytes
from parallel.planner.traffic import (
    Messages,
    data_messages,
    pipeline_messages,
    seconds,
    tensor_messages,
)

MACHINE = Machine(
    name="test", num_nodes=2, gpus_per_node=8, memory_gib=80, bfloat16_tflops=1000,
    float32_tflops=60, memory_bandwidth_gbs=3000, nvlink_gbs=400, network_gbs=400,
)  # fmt: skip
HIDDEN, LAYERS, LENGTH = 1024, 8, 512


def never_built(groups: object) -> Any:
    raise AssertionError("the planner makes no optimizer")


ADAMW = OptimizerSpec("adamw", (StateTensor("exp_avg"), StateTensor("exp_avg_sq")), never_built)
MOMENTUM = OptimizerSpec("momentum", (StateTensor("momentum"),), never_built, counter=None)
WHOLE = replace(ADAMW, name="whole", elementwise=False)


def model(**changes: object) -> ModelCost:
    """Layers of one matrix and one norm; embedding and head cost nothing."""
    layer = Part(
        weights=(Weight(4 * HIDDEN**2, True), Weight(HIDDEN, False, 1)),
        saved=(Saved(HIDDEN, "sequence"), Saved(4 * HIDDEN, "tensor")),
        kept={"full": (Saved(HIDDEN, "sequence"),)},
        matrix_flops=8.0 * HIDDEN**2,
    )
    cost = ModelCost(
        first=Part(weights=(Weight(64 * HIDDEN, True),)),
        layer=layer,
        num_layers=LAYERS,
        last=Part(weights=(Weight(HIDDEN, False, 1),)),
        final=(),
        layer_workspace=(),
        loss=Loss(0, HIDDEN, 0, 0, 0),
        tied=(Weight(64 * HIDDEN, True),),
        hidden_size=HIDDEN,
        key_value_size=2 * HIDDEN,
        seq_length=LENGTH,
        positions_per_token=1.0,
        head_share=1.0,
        flops_per_token=3 * LAYERS * 8.0 * HIDDEN**2,
        stage_costs=((1.0,) * LAYERS, 0.0),
        tensor_parallel_sizes={"heads": 16},
        key_value_heads=16,
        extra_passes=0.0,
        one_stage=False,
        whole_sequences=False,
        teacher=False,
        vocabulary_elements=64 * HIDDEN,
    )
    return replace(cost, **changes)  # type: ignore[arg-type]


def candidate(layout: Layout, **changes: object) -> Candidate:
    return replace(Candidate(layout, 1, 2, 16, ADAMW), **changes)  # type: ignore[arg-type]


class TestTime:
    def test_bubble_of_even_stages_is_that_of_one_forward_one_backward(self) -> None:
        silent = replace(MACHINE, latency_us=0, nvlink_gbs=1e12, network_gbs=1e12)
        for stages, count in ((2, 8), (4, 16), (8, 8)):
            chosen = candidate(Layout(1, stages), num_microbatches=count)
            time = estimate(model(), chosen, silent).time
            passes = time.compute + time.bubble
            assert time.bubble / passes == pytest.approx((stages - 1) / (count + stages - 1))

    def test_uneven_stages_wait_for_the_slowest(self) -> None:
        layers = (1.0,) * 7
        cost = model(num_layers=7, stage_costs=(layers, 0.0))
        plan = estimate(cost, candidate(Layout(1, 2)), MACHINE)
        assert plan.layers == (4, 3)
        even = estimate(model(), candidate(Layout(1, 2)), MACHINE)
        assert plan.time.compute == pytest.approx(even.time.compute)

    def test_mfu_of_a_perfect_machine_is_one(self) -> None:
        perfect = replace(
            MACHINE, matrix_efficiency=1, memory_efficiency=1, memory_bandwidth_gbs=1e12,
            launch_us=0,
        )  # fmt: skip
        plan = estimate(model(), candidate(Layout()), perfect)
        assert plan.mfu == pytest.approx(1.0, rel=1e-6)

    def test_full_recomputation_costs_a_third_more_and_keeps_the_input_only(self) -> None:
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

    def test_few_positions_wait_for_the_weights(self) -> None:
        small = estimate(model(seq_length=1), candidate(Layout(), micro_batch_size=1), MACHINE)
        assert small.mfu < 0.01

    def test_days_and_hours(self) -> None:
        plan = estimate(model(), candidate(Layout(2, 1, 1, 8, True)), MACHINE)
        assert plan.days(plan.tokens_per_day) == pytest.approx(1)
        assert plan.gpu_hours(plan.tokens_per_day) == pytest.approx(24 * 16)


class TestTraffic:
    def test_ring_volumes(self) -> None:
        elements, ring = 1_000_000, 15 / 16
        layout = Layout(data_parallel_size=16)

        def sent(stage: int, count: int = 4) -> float:
            chosen = candidate(layout, zero_stage=stage, num_microbatches=count)
            return data_messages(chosen, elements, 10).bytes / ring / elements

        assert sent(1) == 2 * 4 + 2  # gradients in float32 there and back, weights in bfloat16
        assert sent(2) == 4 * 2 * 4 + 2  # gradients after every micro-batch
        assert sent(3) == 4 * (2 * 2 + 4)
        assert data_messages(candidate(Layout()), elements, 10) == Messages()

    def test_sequence_parallelism_gathers_inputs_once_more(
        self,
    ) -> None:
        plain, sequence = (candidate(Layout(4, 1, 1, 1, sp)) for sp in (False, True))
        stages = [stages_of(model(), c)[0] for c in (plain, sequence)]
        volumes = [
            tensor_messages(model(), c, s).bytes
            for c, s in zip((plain, sequence), stages, strict=True)
        ]
        hidden = 2 * LENGTH * 2 * HIDDEN * 3 / 4
        assert volumes[1] - volumes[0] == pytest.approx(2 * hidden * LAYERS)

    def test_pipeline_sends_hidden_states_and_gradients(self) -> None:
        assert pipeline_messages(model(), candidate(Layout(1, 2))).bytes == 2 * (
            2 * LENGTH * 2 * HIDDEN
        )

    def test_groups_across_nodes_share_the_network(self) -> None:
        message = Messages(1e9, 0.0)
        quiet = replace(MACHINE, latency_us=0)
        assert seconds(Messages(), quiet, 8, 1) == 0
        inside = seconds(Messages(1e9, 1e-9), quiet, 8, 1)
        assert inside == pytest.approx(1 / (400 * 0.7), rel=1e-6)
        assert seconds(replace(message, count=1), quiet, 2, 8) == pytest.approx(8 * inside)
        assert seconds(replace(message, count=1), quiet, 16, 1) == pytest.approx(inside)


class TestMemory:
    def test_degrees_divide_what_they_should(self) -> None:
        saved = (Saved(8, "tensor"), Saved(4, "sequence"), Saved(2, "whole"), Saved(1, "whole", 4))
        assert saved_bytes(saved, 10, candidate(Layout())) == 10 * (2 * 14 + 4)
        assert saved_bytes(saved, 10, candidate(Layout(2))) == 10 * (2 * 10 + 4)
        with_sequence = candidate(Layout(2, sequence_parallel=True))
        assert saved_bytes(saved, 10, with_sequence) == 10 * (2 * 8 + 4)
        assert saved_bytes((Saved(3, fixed=True),), 10, candidate(Layout())) == 6
        context = candidate(Layout(context_parallel_size=2))
        tensors = (Saved(1, under="context"), Saved(5, under="alone"), Saved(2, gathered=True))
        assert saved_bytes(tensors, 10, context) == 10 * 2 * (1 + 4)

    def test_early_stages_hold_more_micro_batches(self) -> None:
        plans = estimate_stages(model(), candidate(Layout(1, 4)))
        sizes = [plan.activations for plan in plans]
        assert [size / sizes[-1] for size in sizes] == [4, 3, 2, 1]
        few = estimate_stages(model(), candidate(Layout(1, 4), num_microbatches=2))
        assert few[0].activations == 2 * few[3].activations

    def test_a_tied_embedding_is_on_both_ends_and_counted_once_on_one(self) -> None:
        first, last = (
            sum(w.elements for w in stage.weights())
            for stage in stages_of(model(), candidate(Layout(1, 2)))
        )
        assert first + last == model().parameters + 64 * HIDDEN
        only = stages_of(model(), candidate(Layout()))[0]
        assert sum(w.elements for w in only.weights()) == model().parameters

    def test_sharding_divides_optimizer_gradients_and_weights_in_turn(self) -> None:
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

    def test_overlap_takes_a_second_bucket_and_none_below_the_largest_tensor(self) -> None:
        small, large = 1000, 4 * HIDDEN**2
        for bucket, held in ((small, large), (10 * large, 10 * large)):
            chosen = candidate(
                Layout(data_parallel_size=4), zero_stage=2, reduce_bucket_size=bucket
            )
            apart = estimate_stages(model(), chosen)[0].state
            beside = replace(chosen, overlap_comm=True)
            overlapped = estimate_stages(model(), beside)[0].state
            assert overlapped.gathered - apart.gathered == 2 * (2 * held - bucket)
            assert replace(overlapped, gathered=apart.gathered) == apart

    def test_offloading_takes_the_optimizer_out_of_the_sum(self) -> None:
        layout = Layout(data_parallel_size=4)
        for stage in (1, 2, 3):
            here, away = (
                estimate_stages(
                    model(), candidate(layout, zero_stage=stage, offload=o, averages=1)
                )[0]
                for o in ("none", "cpu")
            )
            state = away.state
            held = state.parameters + state.gradients
            assert away.total == held + away.activations + away.workspace + state.gathered
            assert state.optimizer + state.averages == here.state.optimizer + here.state.averages
            assert state.host > state.optimizer + state.averages
        assert candidate(Layout(), precision="float32", offload="cpu").effective_stage == 1

    def test_pinned_memory_comes_in_powers_of_two(self) -> None:
        assert [pinned(n) for n in (0, 1, 2, 3, 2**20, 2**20 + 1)] == [0, 1, 2, 4, 2**20, 2**21]

    def test_what_a_node_holds_decides_whether_it_fits(self) -> None:
        chosen = candidate(Layout(data_parallel_size=16), zero_stage=3, offload="cpu")
        plan = estimate(model(), chosen, MACHINE)
        assert plan.fits
        assert plan.host_bytes == 8 * plan.memory.state.host
        short = replace(MACHINE, host_memory_gib=plan.host_bytes / 2**30 + 0.9, host_reserved_gib=1)
        assert not estimate(model(), chosen, short).fits

    def test_offloading_costs_the_ways_and_the_update_on_the_host(self) -> None:
        """By hand: gradients in float32 down, weights in bfloat16 up, 44 bytes of host traffic."""
        layout, one = Layout(data_parallel_size=16), 1e9
        exact = replace(
            MACHINE, network_efficiency=1, memory_efficiency=1, pcie_gbs=10, host_bandwidth_gbs=160
        )
        share = one / 16
        flat = candidate(layout, zero_stage=2, offload="cpu", num_microbatches=4)
        seconds, moved = offload_seconds(flat, exact, int(one))
        assert moved == share * 6
        assert seconds == pytest.approx(share * (6 / 10e9 + 44 / 20e9))
        whole = replace(flat, zero_stage=3)
        seconds, moved = offload_seconds(whole, exact, int(one))
        assert moved == share * (2 * 2 * 4 + 4 * 4 + 3 * 4)
        assert offload_seconds(replace(flat, offload="none"), exact, int(one)) == (0, 0)
        lighter, _ = offload_seconds(replace(flat, optimizer=MOMENTUM), exact, int(one))
        assert lighter == pytest.approx(share * (6 / 10e9 + 36 / 20e9))

    def test_a_teacher_costs_its_weights(self) -> None:
        chosen = candidate(Layout(data_parallel_size=4))
        plain, taught = (estimate_stages(model(teacher=t), chosen)[0].total for t in (False, True))
        assert taught - plain == 2 * model().parameters
        found = search(model(teacher=True), MACHINE, TestSearch.SPACE)
        assert {plan.candidate.zero_stage for plan in found.fitting} == {1, 2}

    def test_total_is_the_larger_of_backward_and_update(self) -> None:
        stage = stages_of(model(), candidate(Layout()))[0]
        memory = stage_memory(model(), candidate(Layout()), stage, 0)
        state = memory.state
        held = state.parameters + state.optimizer + state.gradients
        assert memory.total == held + max(memory.activations + memory.workspace, state.update)

    def test_logits_are_whole_or_in_chunks_that_leave_a_gradient(self) -> None:
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


class TestSearch:
    SPACE = Space(num_gpus=16, global_batch_size=64, precision="bfloat16", optimizer=ADAMW)

    def test_every_plan_is_legal_and_keeps_the_global_batch(self) -> None:
        found = search(model(), MACHINE, self.SPACE)
        plans = (*found.fitting, *found.too_large)
        assert len(plans) > 100
        for plan in plans:
            c, layout = plan.candidate, plan.candidate.layout
            check_layout(
                world_size=16,
                tensor_parallel_size=layout.tensor_parallel_size,
                pipeline_parallel_size=layout.pipeline_parallel_size,
                context_parallel_size=layout.context_parallel_size,
                data_parallel_size=layout.data_parallel_size,
                sequence_parallel=layout.sequence_parallel,
                zero_stage=c.zero_stage,
                precision=c.precision,
                sizes=model().tensor_parallel_sizes,
                num_query_groups=16,
                num_layers=LAYERS,
                seq_length=LENGTH,
            )
            assert c.global_batch_size == 64

    def test_no_layout_is_forgotten(self) -> None:
        """All products of degrees that give 16 ranks, by brute force."""
        found = search(model(), MACHINE, self.SPACE)
        seen = {str(plan.candidate.layout) for plan in (*found.fitting, *found.too_large)}
        wanted = set()
        for tp in (1, 2, 4, 8):  # a node has 8
            for pp in (1, 2, 4, 8):
                for cp in (1, 2, 4, 8) if pp == 1 else (1,):
                    if tp * cp <= 8 and 16 % (tp * pp * cp) == 0:
                        dp = 16 // (tp * pp * cp)
                        wanted.add(str(Layout(tp, pp, cp, dp, tp > 1 and cp == 1)))
        assert seen == wanted

    def test_ranked_by_time_and_split_by_memory(self) -> None:
        tight = replace(MACHINE, memory_gib=5.5)
        found = search(model(), tight, self.SPACE)
        assert found.fitting
        assert found.too_large
        best = found.fitting[0].time.total
        assert all(plan.time.total >= 0.97 * best for plan in found.fitting)
        limit = tight.usable_bytes
        assert all(plan.memory.total <= limit for plan in found.fitting)
        assert all(plan.memory.total > limit for plan in found.too_large)

    def test_simple_layouts_win_where_times_are_alike(self) -> None:
        fast = replace(MACHINE, nvlink_gbs=1e9, network_gbs=1e9, latency_us=0)
        found = search(model(), fast, self.SPACE)
        best = found.fitting[0].candidate
        assert best.layout == Layout(data_parallel_size=16)
        assert (best.zero_stage, best.recompute) == (1, "none")

    def test_reasons_are_told(self) -> None:
        odd = model(tensor_parallel_sizes={"heads": 17}, key_value_heads=17)
        found = search(odd, MACHINE, self.SPACE)
        assert any("does not divide heads 17" in reason for reason in found.refused)
        assert {plan.candidate.layout.tensor_parallel_size for plan in found.fitting} == {1}

    def test_an_optimizer_that_needs_whole_tensors_gets_them(self) -> None:
        space = replace(self.SPACE, precision="float32", optimizer=WHOLE)
        plans = search(model(), MACHINE, space).fitting
        assert {plan.candidate.effective_stage for plan in plans} == {0}
        assert {plan.candidate.layout.tensor_parallel_size for plan in plans} == {1}
        assert {plan.candidate.layout.pipeline_parallel_size for plan in plans} == {1}
        assert not search(model(), MACHINE, replace(space, offload="cpu")).fitting

    def test_offloading_is_searched_where_it_is_legal(self) -> None:
        found = search(model(), MACHINE, replace(self.SPACE, offload="cpu"))
        assert {plan.candidate.zero_stage for plan in found.fitting} == {1, 2, 3}
        assert {plan.candidate.offload for plan in found.fitting} == {"cpu"}

    def test_an_objective_that_needs_the_whole_model_gets_it(self) -> None:
        found = search(model(one_stage=True), MACHINE, self.SPACE)
        layouts = [plan.candidate.layout for plan in found.fitting]
        assert {layout.pipeline_parallel_size for layout in layouts} == {1}
        assert {layout.context_parallel_size for layout in layouts} == {1}

    def test_divisors(self) -> None:
        assert divisors(12, 6) == [1, 2, 3, 4, 6]


class TestMachine:
    GOOD: ClassVar = {
        k: v for k, v in MACHINE.__dict__.items() if not k.endswith(("efficiency", "_us"))
    }

    def test_defaults_are_filled_in(self) -> None:
        assert Machine.from_mapping(self.GOOD, "m.yaml") == MACHINE

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"memory_gb": 80}, "m.yaml: unknown key 'memory_gb'; known: .*memory_gib"),
            ({"memory_gib": None}, "memory_gib is None; it must be a number"),
            ({"num_nodes": 0}, "num_nodes is 0; it must be a whole number from 1"),
            ({"num_nodes": 1.5}, "num_nodes is 1.5; it must be a whole number"),
            ({"bfloat16_tflops": "fast"}, "bfloat16_tflops is 'fast'; it must be a number"),
            ({"bfloat16_tflops": 0}, "bfloat16_tflops is 0; it must be larger"),
            ({"matrix_efficiency": 1.2}, r"matrix_efficiency is 1.2; it must lie in \(0, 1\]"),
            ({"reserved_gib": 80}, "reserved_gib 80 leaves nothing of memory_gib 80"),
            ({"host_memory_gib": 100}, "host_reserved_gib 128.0 leaves nothing of host_memory_gib"),
        ],
    )
    def test_mistakes(self, change: dict[str, object], message: str) -> None:
        with pytest.raises(LayoutError, match=message):
            Machine.from_mapping({**self.GOOD, **change}, "m.yaml")

    def test_a_missing_key(self) -> None:
        rest = {k: v for k, v in self.GOOD.items() if k != "nvlink_gbs"}
        with pytest.raises(LayoutError, match=r"m\.yaml: no value for nvlink_gbs"):
            Machine.from_mapping(rest, "m.yaml")
