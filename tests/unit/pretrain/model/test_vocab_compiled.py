"""Compiled losses: the formulas against float64, compiled against plain, and what they keep."""

from __future__ import annotations

import pytest
import torch
from small import FAMILIES, SPACE, build, clean_batch
from torch._dynamo.utils import counters
from torch.autograd.graph import saved_tensors_hooks

from pretrain.model import vocab_compiled
from pretrain.model.vocab import VocabChunk
from pretrain.model.vocab_compiled import (
    CompiledChunk,
    cross_entropy,
    divergence,
    log1p_terms,
)
from pretrain.noise.key import NoiseKey
from pretrain.training.compilation import missing_compiler

needs_compiler = pytest.mark.skipif(missing_compiler() is not None, reason=str(missing_compiler()))
V, EXCLUDED = 64, [0, 1, 2, 40, 63]
ALLOWED = [v for v in range(V) if v not in EXCLUDED]


@pytest.fixture(autouse=True)
def _nothing_compiled_before():
    torch._dynamo.reset()
    counters.clear()
    vocab_compiled._compiled.cache_clear()


@pytest.fixture
def nothing_compiles(monkeypatch):
    def refuse(formula):
        raise AssertionError(f"{formula.__name__} should not be compiled here")

    monkeypatch.setattr(vocab_compiled, "_compiled", refuse)


def compiled_chunk(logits, topology):
    return CompiledChunk(VocabChunk(logits, topology))


def outputs(n, dtype, seed=0):
    """Logits whose excluded columns hold -inf, ids that can be predicted, and further numbers."""
    g = torch.Generator().manual_seed(seed)
    logits = (3 * torch.randn(n, V, generator=g)).to(dtype)
    logits[:, EXCLUDED] = -torch.inf
    ids = torch.tensor(ALLOWED)[torch.randint(len(ALLOWED), (n, 2), generator=g)]
    return logits, ids, 50 * torch.rand(n, generator=g), torch.rand(n, generator=g)


def reference(name, p, log_p, q, log_q, ids, rho):
    """Each loss as its definition, from probabilities of the columns that can be predicted."""
    columns = (torch.tensor(ALLOWED)[None, :] == ids[..., None]).double()  # [n, k, v]
    at = (columns * log_p[:, None]).sum(dim=-1)
    if name == "cross_entropy":
        return -at[:, 0]
    if name == "log1p_terms":
        return at.sum(dim=1) + (1 + rho.double()[:, None] * p).log().sum(dim=1)
    if name == "reverse":
        return (p * (log_p - log_q)).sum(dim=1)
    return (q * (log_q - log_p)).sum(dim=1)


def computed(name, logits, other, ids, rho):
    """The same by the formulas that are compiled."""
    if name == "cross_entropy":
        return cross_entropy(logits, ids[:, 0])
    if name == "log1p_terms":
        log_p, total = log1p_terms(logits, ids, rho)
        return log_p.sum(dim=1) + total
    return divergence(logits, other, name == "reverse")


@pytest.mark.parametrize("name", ["cross_entropy", "log1p_terms", "reverse", "forward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_formulas_are_their_definitions_over_what_can_be_predicted(name, dtype):
    logits, ids, rho, weight = outputs(9, dtype)
    other = outputs(9, dtype, seed=1)[0]
    logits.requires_grad_()
    loss = computed(name, logits, other, ids, rho)
    (loss * weight).sum().backward()
    exact = logits.detach().double()[:, ALLOWED].requires_grad_()
    log_p, log_q = exact.log_softmax(-1), other.double()[:, ALLOWED].log_softmax(-1)
    want = reference(name, log_p.exp(), log_p, log_q.exp(), log_q, ids, rho)
    (want * weight).sum().backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), want, rtol=2e-6, atol=2e-6)
    tolerance = {"rtol": 2.0**-8, "atol": 1e-6} if dtype == torch.bfloat16 else {}
    gradient = logits.grad.double()[:, ALLOWED]
    torch.testing.assert_close(gradient, exact.grad, **tolerance or {"rtol": 1e-5, "atol": 2e-6})
    assert not logits.grad[:, EXCLUDED].any()


def trained(topology, objective, dtype, compile_loss, chunk=7):
    """Loss and gradients of a step whose rows are split into chunks of two sizes."""
    module = build(topology, objective, dtype, chunk)
    module.compile_loss = compile_loss
    clean = clean_batch()
    loss = module(module.objective.corrupt(clean, NoiseKey(5, clean.position)))
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in module.named_parameters()}


@needs_compiler
@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        ("autoregressive", torch.bfloat16),
        pytest.param("autoregressive", torch.float32, marks=pytest.mark.slow),
        pytest.param("masked", torch.float32, marks=pytest.mark.slow),
        pytest.param("uniform", torch.float32, marks=pytest.mark.slow),
        pytest.param("uniform", torch.bfloat16, marks=pytest.mark.slow),
        pytest.param("interpolating", torch.float32, marks=pytest.mark.slow),
        pytest.param("block", torch.float32, marks=pytest.mark.slow),
        pytest.param("esoteric", torch.float32, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_compiled_losses_train_as_plain_ones_do(topology, family, dtype):
    loss, gradients = trained(topology, FAMILIES[family], dtype, compile_loss=True)
    assert counters["stats"]["unique_graphs"] > 0
    assert not counters["graph_break"]
    want, wanted = trained(topology, FAMILIES[family], dtype, compile_loss=False)
    # What is rounded to bfloat16 is the same in both; float32 sums differ by their order.
    tolerance = 1e-5 if dtype == torch.float32 else 2e-3
    torch.testing.assert_close(loss, want, rtol=1e-6, atol=0)
    for name, gradient in wanted.items():
        error = (gradients[name] - gradient).float().norm() / gradient.float().norm()
        assert error <= tolerance, (name, float(error))


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("reverse", [True, False])
def test_compiled_divergences_are_plain_ones(topology, reverse):
    logits, other = outputs(9, torch.float32)[0], outputs(9, torch.float32, seed=1)[0]
    found = []
    for kind in (VocabChunk, compiled_chunk):
        mine = logits.clone().requires_grad_()
        kl = kind(mine, topology).divergence_from(VocabChunk(other, topology), reverse)
        kl.sum().backward()
        found.append((kl.detach(), mine.grad))
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-5)


@needs_compiler
def test_in_half_precision_nothing_wider_than_the_logits_is_kept(topology):
    def kept(kind):
        logits, ids, _, _ = outputs(32, torch.bfloat16)
        logits.requires_grad_()
        saved: dict[int, int] = {}

        def keep(x):
            if x.dim() == 2 and x.shape[-1] == V:
                saved[x.data_ptr()] = x.untyped_storage().nbytes()
            return x

        with saved_tensors_hooks(keep, lambda x: x):
            loss = kind(logits, topology).cross_entropy(ids[:, 0])
        loss.sum().backward()
        return sum(saved.values())

    assert kept(compiled_chunk) == 32 * V * 2
    assert kept(VocabChunk) == 32 * V * 4


def test_any_number_of_rows_takes_two_graphs(topology, monkeypatch):
    graphs = torch.compile(cross_entropy, fullgraph=True, backend="eager")
    monkeypatch.setattr(vocab_compiled, "_compiled", lambda formula: graphs)
    for n in (5, 9, 12, 31, 64, 100, 101):
        logits, ids, _, weight = outputs(n, torch.float32)
        logits.requires_grad_()
        (compiled_chunk(logits, topology).cross_entropy(ids[:, 0]) * weight).sum().backward()
    assert counters["stats"]["unique_graphs"] == 2


@pytest.mark.parametrize("family", ["autoregressive", "uniform"])
def test_bounds_are_never_compiled(topology, family, nothing_compiles):
    clean = clean_batch()
    bounds = []
    for compile_loss in (False, True):
        module = build(topology, FAMILIES[family])
        module.compile_loss = compile_loss
        batch = module.objective.bound_batch(clean, NoiseKey(5, clean.position))
        with torch.no_grad():
            bounds.append(module(batch, exact=True))
    assert torch.equal(*bounds)


def test_no_rows_have_no_losses_and_a_gradient(topology, nothing_compiles):
    logits, ids, rho, _ = (x[:0] for x in outputs(3, torch.bfloat16))
    logits.requires_grad_()
    chunk = compiled_chunk(logits, topology)
    losses = [
        chunk.cross_entropy(ids[:, 0]),
        *chunk.log1p_terms(ids, rho),
        chunk.divergence_from(VocabChunk(logits.detach(), topology), reverse=True),
    ]
    assert [len(loss) for loss in losses] == [0, 0, 0, 0]
    sum(loss.sum() for loss in losses).backward()
    assert logits.grad.shape == (0, V)


def test_the_setting_reaches_the_module(topology):
    from pretrain.config.compose import compose
    from pretrain.objectives import build_objective
    from pretrain.training.session import build_model

    paths = [f"data.{name}=/nowhere" for name in ("train", "validation", "tokenizer")]
    shape = ["model.num_layers=1", "model.hidden_size=16", "model.num_attention_heads=2"]
    for given in (False, True):
        config = compose([*paths, *shape, f"train.compile_loss={given}"])
        objective = build_objective(config.objective, SPACE)
        assert build_model(config, topology, objective).compile_loss is given
