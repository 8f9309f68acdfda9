"""Compiled layers: the same numbers, one graph for all of them, names and checkpoints as before."""

from __future__ import annotations

from dataclasses import replace
from functools import partialmethod

import pytest
import torch
from test_recompute import SHAPES, build, gradients, hidden
from torch._dynamo.utils import counters

from pretrain.training.compilation import missing_compiler

needs_compiler = pytest.mark.skipif(missing_compiler() is not None, reason=str(missing_compiler()))
CASES = [
    ("plain", "causal", "none"),
    ("plain", "columns", "selective"),
    ("plain", "causal", "full"),
    ("grouped", "bidirectional", "none"),
    ("squared_relu", "bidirectional", "none"),
    ("convolved", "columns", "selective"),
    ("convolved", "causal", "none"),
    ("conditioned", "bidirectional", "none"),
]


@pytest.fixture(autouse=True)
def _nothing_compiled_before():
    torch._dynamo.reset()
    counters.clear()


def compiled(topology, mode="none", **changes):
    model = build(topology, mode, **{**changes, "num_layers": 2, "init_std": 0.1})
    model.compile_layers()
    return model


def eager(topology, mode="none", **changes):
    return build(topology, mode, **{**changes, "num_layers": 2, "init_std": 0.1})


def assert_same(model, reference, kind):
    out, want = hidden(model, kind).detach(), hidden(reference, kind).detach()
    assert (out - want).norm() <= 1e-5 * want.norm()
    found, wanted = gradients(model, kind), gradients(reference, kind)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert (found[name] - gradient).norm() <= 1e-4 * gradient.norm(), name


@pytest.mark.parametrize(("shape", "kind", "mode"), [CASES[1], CASES[-1]])
def test_layers_are_traced_whole_and_once(topology, shape, kind, mode, monkeypatch):
    """All that the compiler does up to kernels, which take half a minute each."""
    traced = partialmethod(torch.nn.Module.compile, backend="aot_eager")
    monkeypatch.setattr(torch.nn.Module, "compile", traced)
    check(topology, shape, kind, mode)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(("shape", "kind", "mode"), CASES)
def test_compiled_layers_compute_what_they_did(topology, shape, kind, mode):
    check(topology, shape, kind, mode)


def check(topology, shape, kind, mode):
    model = compiled(topology, mode, **SHAPES[shape])
    assert_same(model, eager(topology, mode, **SHAPES[shape]), kind)
    # All layers share one graph, and no part of a layer is left outside.
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_a_kernel_that_cannot_be_compiled_is_called_as_it_is(topology, mode, monkeypatch):
    """As flash-attn on a GPU; here SDPA in its place."""
    import pretrain.model.attention as attention

    plain, calls = attention.plan_attention, []

    def planned(*arguments):
        return replace(plain(*arguments), kernel="flash_attn_4")

    def kernel(q, k, v, rule, name, p):
        assert not torch.compiler.is_compiling()
        calls.append(name)
        return attention.sdpa.attend(q, k, v, None, rule.kind == "causal", p)

    monkeypatch.setattr("pretrain.model.transformer.plan_attention", planned)
    monkeypatch.setattr(attention.flash, "attend", kernel)
    assert_same(compiled(topology, mode), eager(topology, mode), "causal")
    assert len(calls) == (12 if mode == "full" else 8)  # a pass through 2 layers of 2 models is 4
    assert sum(counters["graph_break"].values()) > 0


def test_names_and_checkpoints_are_those_of_a_model_that_is_not_compiled(topology):
    model, other = compiled(topology), build(topology, num_layers=2, init_std=0.3)
    assert model.state_dict().keys() == other.state_dict().keys()
    assert [n for n, _ in model.named_modules()] == [n for n, _ in other.named_modules()]
    other.load_state_dict(model.state_dict())
    for (name, a), (_, b) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(a, b), name
