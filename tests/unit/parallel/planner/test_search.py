"""Search for layouts against brute force, and its order."""

from __future__ import annotations

from dataclasses import replace

from planner_cases import ADAMW, LAYERS, LENGTH, MACHINE, WHOLE, model

from parallel.layout.rules import Layout, check_layout
from parallel.planner.plan import Space, search

SPACE = Space(num_gpus=16, global_batch_size=64, precision="bfloat16", optimizer=ADAMW)


def test_every_plan_is_legal_and_keeps_the_global_batch() -> None:
    found = search(model(), MACHINE, SPACE)
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


def test_no_layout_is_forgotten() -> None:
    """All products of degrees that give 16 ranks, by brute force."""
    found = search(model(), MACHINE, SPACE)
    seen = {str(plan.candidate.layout) for plan in (*found.fitting, *found.too_large)}
    wanted = set()
    for tp in (1, 2, 4, 8):  # a node has 8
        for pp in (1, 2, 4, 8):
            for cp in (1, 2, 4, 8) if pp == 1 else (1,):
                if tp * cp <= 8 and 16 % (tp * pp * cp) == 0:
                    dp = 16 // (tp * pp * cp)
                    wanted.add(str(Layout(tp, pp, cp, dp, tp > 1 and cp == 1)))
    assert seen == wanted


def test_ranked_by_time_and_split_by_memory() -> None:
    tight = replace(MACHINE, memory_gib=5.5)
    found = search(model(), tight, SPACE)
    assert found.fitting
    assert found.too_large
    best = found.fitting[0].time.total
    assert all(plan.time.total >= 0.97 * best for plan in found.fitting)
    limit = tight.usable_bytes
    assert all(plan.memory.total <= limit for plan in found.fitting)
    assert all(plan.memory.total > limit for plan in found.too_large)


def test_simple_layouts_win_where_times_are_alike() -> None:
    fast = replace(MACHINE, nvlink_gbs=1e9, network_gbs=1e9, latency_us=0)
    found = search(model(), fast, SPACE)
    best = found.fitting[0].candidate
    assert best.layout == Layout(data_parallel_size=16)
    assert (best.zero_stage, best.recompute) == (1, "none")


def test_reasons_are_given() -> None:
    odd = model(tensor_parallel_sizes={"heads": 17}, key_value_heads=17)
    found = search(odd, MACHINE, SPACE)
    assert any("does not divide heads 17" in reason for reason in found.refused)
    assert {plan.candidate.layout.tensor_parallel_size for plan in found.fitting} == {1}


def test_an_optimizer_that_needs_whole_tensors_gets_them() -> None:
    space = replace(SPACE, precision="float32", optimizer=WHOLE)
    plans = search(model(), MACHINE, space).fitting
    assert {plan.candidate.effective_stage for plan in plans} == {0}
    assert {plan.candidate.layout.tensor_parallel_size for plan in plans} == {1}
    assert {plan.candidate.layout.pipeline_parallel_size for plan in plans} == {1}
    assert not search(model(), MACHINE, replace(space, offload="cpu")).fitting


def test_offloading_is_searched_where_it_is_legal() -> None:
    found = search(model(), MACHINE, replace(SPACE, offload="cpu"))
    assert {plan.candidate.zero_stage for plan in found.fitting} == {1, 2, 3}
    assert {plan.candidate.offload for plan in found.fitting} == {"cpu"}


def test_an_objective_that_needs_the_whole_model_gets_it() -> None:
    found = search(model(pipeline=False, context=False), MACHINE, SPACE)
    layouts = [plan.candidate.layout for plan in found.fitting]
    assert {layout.pipeline_parallel_size for layout in layouts} == {1}
    assert {layout.context_parallel_size for layout in layouts} == {1}


def test_an_objective_that_refuses_stage_3_is_not_given_it() -> None:
    found = search(model(largest_zero_stage=2), MACHINE, SPACE)
    assert {plan.candidate.zero_stage for plan in found.fitting} == {1, 2}
