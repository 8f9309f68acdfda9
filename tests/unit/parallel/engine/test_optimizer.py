"""Declarations of optimizers: what they hold of real ones, and what they refuse."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch

from parallel.engine import fragments
from parallel.engine.optimizer import OptimizerSpec, StateTensor, check_optimizer
from parallel.engine.settings import build_optimizer
from parallel.errors import LayoutError, OptimizerError
from parallel.layout.rules import Layout

MOMENTS = (StateTensor("exp_avg"), StateTensor("exp_avg_sq"))


def of_torch(name: str, **options: Any) -> Any:
    return lambda groups: getattr(torch.optim, name)(groups, **options)


REAL = {
    "adamw": OptimizerSpec("adamw", MOMENTS, of_torch("AdamW", fused=True)),
    "amsgrad": OptimizerSpec(
        "amsgrad", (*MOMENTS, StateTensor("max_exp_avg_sq")), of_torch("Adam", amsgrad=True)
    ),
    "momentum": OptimizerSpec(
        "momentum", (StateTensor("momentum_buffer"),), of_torch("SGD", momentum=0.9), counter=None
    ),
    "plain": OptimizerSpec("plain", (), of_torch("SGD"), counter=None),
}


def stepped(spec: OptimizerSpec, created: bool) -> tuple[list[fragments.Updated], Any]:
    """Two tensors after an update; with `created` the engine has made the state before it."""
    torch.manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(shape)) for shape in ((3, 4), (5,))]
    optimizer = build_optimizer(spec, [{"params": weights[:1]}, {"params": weights[1:]}])
    if created:
        fragments.create_state(weights, optimizer, spec, step=0, average=True)
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    return fragments.updated_tensors(weights, optimizer), optimizer


@pytest.mark.parametrize("spec", REAL.values(), ids=list(REAL))
def test_a_declaration_is_what_the_optimizer_holds_after_a_step(spec: OptimizerSpec) -> None:
    tensors, optimizer = stepped(spec, created=False)
    fragments.check_state(tensors, optimizer, spec)
    values = [v for state in optimizer.state.values() for v in state.values()]
    held = sum(v.untyped_storage().nbytes() for v in values)
    elements, group = sum(one.tensor.numel() for one in tensors), spec.group("any", (3, 4))
    assert held == group.element_bytes * elements + group.counter_bytes * len(tensors)
    counted = fragments.counted_updates(tensors, optimizer, spec)
    assert counted == ({1} if spec.counter is not None else set())


@pytest.mark.parametrize("spec", REAL.values(), ids=list(REAL))
def test_created_state_is_what_the_optimizer_starts_with(spec: OptimizerSpec) -> None:
    ours, created = stepped(spec, created=True)
    theirs, lazy = stepped(spec, created=False)
    fragments.check_state(ours, created, spec)
    for (a, _), (b, _) in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)
        for name in spec.names:
            assert torch.equal(created.state[a][name], lazy.state[b][name])


@pytest.mark.parametrize(
    "change",
    [
        {"state": MOMENTS[:1]},
        {"state": (*MOMENTS, StateTensor("momentum"))},
        {"state": (MOMENTS[0], StateTensor("exp_avg_sq", "bfloat16"))},
        {"counter": None},
    ],
)
def test_a_wrong_declaration_is_refused_with_what_is_kept(change: dict[str, Any]) -> None:
    tensors, optimizer = stepped(REAL["adamw"], created=False)
    wrong = replace(REAL["adamw"], **change)
    with pytest.raises(OptimizerError, match=r"adamw declares .* keeps \{'exp_avg': 'float32', "):
        fragments.check_state(tensors, optimizer, wrong)


@pytest.mark.parametrize("name", ["weight", "ema", "teacher", "step", "a/b", ""])
def test_names_of_state_are_not_those_of_something_else(name: str) -> None:
    with pytest.raises(AssertionError):
        StateTensor(name)


DP2, TP2, PP2 = Layout(data_parallel_size=2), Layout(2), Layout(1, 2)


@pytest.mark.parametrize(
    ("layout", "zero_stage", "precision", "offload", "words"),
    [
        (DP2, 0, "float32", "none", None),
        (Layout(), 3, "float32", "none", None),  # runs as stage 0
        (Layout(context_parallel_size=2), 0, "float32", "none", None),
        (DP2, 1, "float32", "none", "needs parallel.zero_stage 0 .*, not 1"),
        (Layout(), 1, "bfloat16", "none", "needs parallel.zero_stage 0 .*, not 1"),
        (PP2, 1, "float32", "none", "needs parallel.zero_stage 0 .*, not 1"),
        (TP2, 0, "float32", "none", "needs parallel.tensor_parallel_size 1, not 2"),
        (Layout(), 2, "float32", "cpu", "needs parallel.zero_stage 0 .*, not 2"),
    ],
)
def test_an_optimizer_of_whole_tensors_needs_them(
    layout: Layout, zero_stage: int, precision: str, offload: str, words: str | None
) -> None:
    check_optimizer(REAL["adamw"], layout, zero_stage, precision, offload)
    whole = replace(REAL["adamw"], elementwise=False)
    if words is None:
        check_optimizer(whole, layout, zero_stage, precision, offload)
        return
    with pytest.raises(LayoutError, match=words):
        check_optimizer(whole, layout, zero_stage, precision, offload)


def test_an_optimizer_may_refuse_host_memory() -> None:
    with pytest.raises(LayoutError, match="cannot update in host memory"):
        check_optimizer(replace(REAL["adamw"], offload=False), DP2, 1, "float32", "cpu")


def test_a_declaration_needs_no_torch() -> None:
    code = "import sys; import parallel.engine.optimizer; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
