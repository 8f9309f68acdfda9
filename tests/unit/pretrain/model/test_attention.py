"""Every attention kernel against float64 softmax attention under every rule, both directions.

flash-attn and a GPU are rarely at hand, so its adapters are tested on a stand-in with the packages'
signatures that computes what they document; `-m gpu` runs the same cases on the real ones.
"""

from __future__ import annotations

import inspect
import sys
import types
from itertools import pairwise
from typing import Any

import pytest
import torch
from attention_cases import (
    LENGTH,
    ROWS,
    cases,
    clean_batch,
    family,
    inputs,
    readable,
    reference,
)
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from pretrain.batch import AttentionRule, TrainBatch
from pretrain.errors import ConfigError
from pretrain.model.attention import AttentionPlan, Call, attend, flash, flex, plan_attention
from pretrain.noise.key import NoiseKey

CASES = cases()
HEADS = [(4, 4), (6, 2), (4, 1)]
ON_FLASH = [
    (kernel, name)
    for kernel in ("flash_attn_2", "flash_attn_4", "torch_varlen")
    for name, (kind, _) in CASES.items()
    if kind == "documents" or (kind != "columns" and kernel != "torch_varlen")
]


def gradients(out: Tensor, given: list[Tensor]) -> list[Tensor]:
    """The output, and the gradients of q, k and v."""
    return [out, *torch.autograd.grad(out, given[:3], given[3])]


def relative(out: Tensor, expected: Tensor) -> float:
    return float((out.double() - expected).norm() / expected.norm())


def assert_close(ours: list[Tensor], theirs: list[Tensor], tolerance: float) -> None:
    for name, a, b in zip(("output", "dq", "dk", "dv"), ours, theirs, strict=True):
        assert relative(a.detach(), b.detach()) <= tolerance, name


@pytest.mark.parametrize("name", CASES)
def test_rules_are_of_the_kind_that_fast_kernels_look_for(name: str) -> None:
    kind, rule = CASES[name]
    assert rule.kind == kind
    assert (rule.documents is not None) == (kind == "documents")


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_sdpa(name: str, heads: tuple[int, int]) -> None:
    _, rule = CASES[name]
    given = inputs(rule, *heads, 8)
    length = given[0].shape[0]
    plan = plan_attention(rule, "sdpa", Call("cpu", torch.float64, 8), ROWS, length)
    expected = gradients(reference(*given[:3], readable(rule, ROWS, length)), given)
    assert_close(gradients(attend(*given[:3], plan), given), expected, 1e-12)


@pytest.mark.parametrize("name", [n for n, (kind, _) in CASES.items() if kind != "bidirectional"])
def test_flex_asks_the_rule(name: str) -> None:
    """What a block mask is built from and a kernel evaluates, at every pair."""
    _, rule = CASES[name]
    length = LENGTH if rule.columns is None else rule.columns.shape[2]
    b, q, k = torch.meshgrid(*(torch.arange(n) for n in (ROWS, length, length)), indexing="ij")
    reads = flex.causal if rule.kind == "causal" else flex.mask_function(rule)
    assert (reads(b, torch.zeros_like(b), q, k).numpy() == readable(rule, ROWS, length)).all()


@pytest.mark.parametrize("name", ["causal", "bidirectional", "documents, short", "block"])
def test_flex(name: str) -> None:
    """Forward only: there is no backward pass on a CPU."""
    _, rule = CASES[name]
    q, k, v = (x.detach().float() for x in inputs(rule, 6, 2, 16)[:3])
    length = q.shape[0]
    with torch.no_grad():
        plan = plan_attention(rule, "flex", Call("cpu", torch.float32, 16), ROWS, length)
        out = attend(q, k, v, plan)
    expected = reference(q.double(), k.double(), v.double(), readable(rule, ROWS, length))
    assert relative(out, expected) <= 1e-6


def test_a_new_batch_compiles_nothing_again() -> None:
    """Each batch brings a rule of its own; only the columns differ, and they are inputs."""
    masks, kernels = CompileCounterWithBackend("eager"), CompileCounterWithBackend("eager")
    build = torch.compile(create_block_mask, backend=masks)
    run = torch.compile(flex_attention, backend=kernels)
    hidden = family("autoregressive", hide="queries")
    clean = clean_batch(True, False)
    q, k, v = (torch.zeros(ROWS, 2, LENGTH, 16) for _ in range(3))
    with torch.no_grad():
        for seed in range(3):
            rule = hidden.corrupt(clean, NoiseKey(seed, clean.position)).attention
            mask = build(flex.mask_function(rule), ROWS, None, LENGTH, LENGTH, device="cpu")
            run(q, k, v, block_mask=mask)
    assert (masks.frame_count, kernels.frame_count) == (1, 1)


@pytest.mark.slow
def test_flex_compiles_its_rule_and_its_tiles() -> None:
    """As on a GPU: the mask is built by compiled code, and the rule is inside the kernel."""
    _, rule = CASES["hidden from queries"]
    q, k, v = (x.detach().float() for x in inputs(rule, 4, 2, 16)[:3])
    with torch.no_grad():
        build, run = torch.compile(create_block_mask), torch.compile(flex_attention)
        mask = build(flex.mask_function(rule), ROWS, None, LENGTH, LENGTH, device="cpu")
        out = run(*(x.permute(1, 2, 0, 3) for x in (q, k, v)), block_mask=mask, enable_gqa=True)
    expected = reference(q.double(), k.double(), v.double(), readable(rule, ROWS, LENGTH))
    assert relative(out.permute(2, 0, 1, 3), expected) <= 1e-6


def whole(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None,
    causal: bool = False, window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0,
    alibi_slopes: Tensor | None = None, deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor:  # fmt: skip
    """flash_attn_func of version 2 as documented: q, k, v [b, s, heads or groups, d]."""
    assert dropout_p == 0.0
    b, s = q.shape[:2]
    mask = torch.ones(s, s, dtype=torch.bool).tril() if causal else torch.ones(s, s).bool()
    first = [x.transpose(0, 1) for x in (q, k, v)]
    return reference(*first, mask.expand(b, s, s).numpy()).transpose(0, 1)


def packed(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
    max_seqlen_q: int, max_seqlen_k: int, dropout_p: float = 0.0,
    softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0,
    alibi_slopes: Tensor | None = None, deterministic: bool = False,
    return_attn_probs: bool = False, block_table: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """flash_attn_varlen_func of version 2 as documented: q, k, v [total, heads or groups, d]."""
    assert q.is_contiguous() and k.is_contiguous() and v.is_contiguous()
    assert cu_seqlens_q.dtype == torch.int32 and torch.equal(cu_seqlens_q, cu_seqlens_k)
    bounds = cu_seqlens_q.tolist()
    sizes = [stop - start for start, stop in pairwise(bounds)]
    assert bounds[0] == 0 and bounds[-1] == len(q) == len(k) == len(v)
    assert isinstance(max_seqlen_q, int) and max_seqlen_q == max_seqlen_k == max(sizes)
    parts = zip(*(x.split(sizes) for x in (q, k, v)), strict=True)
    return torch.cat([whole(*(x[None] for x in part), causal=causal)[0] for part in parts])


def whole_4(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, deterministic: bool = False
) -> tuple[Tensor, Tensor]:
    """The part of flash_attn.cute.flash_attn_func that is used; it returns the log-sum-exp too."""
    return whole(q, k, v, causal=causal), q.new_zeros(1)


def packed_4(
    q: Tensor, k: Tensor, v: Tensor, *, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
    max_seqlen_q: int, max_seqlen_k: int, causal: bool = False, deterministic: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The part of flash_attn.cute.flash_attn_varlen_func that is used."""
    bounds = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return packed(q, k, v, *bounds, causal=causal), q.new_zeros(1)


def varlen(*arguments: Any, **named: Any) -> Tensor:
    """torch's varlen_attn, whose real signature the call has to fit."""
    from torch.nn.attention.varlen import varlen_attn

    call = inspect.signature(varlen_attn).bind(*arguments, **named).arguments
    q, k, v = call["query"], call["key"], call["value"]
    assert call["enable_gqa"] == (q.shape[1] != k.shape[1])
    window = call["window_size"]
    assert window in ((-1, -1), (-1, 0))
    bounds = (call["cu_seq_q"], call["cu_seq_k"], call["max_q"], call["max_k"])
    return packed(q, k, v, *bounds, causal=window == (-1, 0))


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    """flash-attn 2 and 4 as modules, and torch's packed form."""
    two, four = types.ModuleType("flash_attn"), types.ModuleType("flash_attn.cute")
    two.flash_attn_func, two.flash_attn_varlen_func = whole, packed  # type: ignore[attr-defined]
    four.flash_attn_func, four.flash_attn_varlen_func = whole_4, packed_4  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", two)
    monkeypatch.setitem(sys.modules, "flash_attn.cute", four)
    flash._load.cache_clear()
    load = flash._load

    def with_packed(kernel: str) -> Any:
        return (None, varlen) if kernel == "torch_varlen" else load(kernel)

    monkeypatch.setattr(flash, "_load", with_packed)
    yield
    load.cache_clear()


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize(("kernel", "name"), ON_FLASH)
def test_flash_adapters(kernel: str, name: str, heads: tuple[int, int]) -> None:
    _, rule = CASES[name]
    given = inputs(rule, *heads, 8)
    length = given[0].shape[0]
    expected = gradients(reference(*given[:3], readable(rule, ROWS, length)), given)
    plan = AttentionPlan(rule, kernel)  # type: ignore[arg-type]
    assert_close(gradients(attend(*given[:3], plan), given), expected, 1e-12)


def test_dropped_weights_are_zero_and_the_others_grow() -> None:
    """With v the identity the output is the attention matrix itself."""
    _, rule = CASES["documents, short"]
    q, k, _, _ = (x.detach() for x in inputs(rule, 2, 2, LENGTH))
    v = torch.eye(LENGTH, dtype=q.dtype)[:, None, None].expand(LENGTH, ROWS, 2, LENGTH)
    plan = plan_attention(rule, "auto", Call("cpu", q.dtype, LENGTH, 0.1), ROWS, LENGTH)
    torch.manual_seed(1)
    kept, full = attend(q, k, v, plan, 0.25), attend(q, k, v, plan)
    dropped = (kept == 0) & (full > 0)
    torch.testing.assert_close(torch.where(dropped, 0, full / 0.75), kept)
    share = float(dropped.sum() / (full > 0).sum())
    assert abs(share - 0.25) < 4 * (0.25 * 0.75 / int((full > 0).sum())) ** 0.5


@pytest.mark.usefixtures("stand_ins")
def test_flash_attn_2_is_given_the_dropout(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def note(*arguments: Any, dropout_p: float, **named: Any) -> Tensor:
        seen.append(dropout_p)
        return arguments[0]

    monkeypatch.setattr(flash, "_load", lambda kernel: (note, note))
    for name in ("causal", "documents"):
        rule = CASES[name][1]
        attend(*inputs(rule, 2, 2, 8)[:3], AttentionPlan(rule, "flash_attn_2"), 0.125)
    assert seen == [0.125, 0.125]


def test_flex_refuses_to_train_on_a_cpu() -> None:
    call = Call("cpu", torch.float32, 16)
    with pytest.raises(ConfigError, match="no backward pass on a CPU"):
        plan_attention(AttentionRule("causal"), "flex", call, ROWS, LENGTH)


def test_documents_move_with_their_batch() -> None:
    """Bounds are tensors of the batch like the others, and their kind survives the copy."""
    rule = CASES["documents"][1]
    batch = TrainBatch(
        ids=torch.zeros(ROWS, LENGTH), positions=torch.zeros(1), attention=rule, noise_level=None,
        rows=None, targets=torch.zeros(1), weight=torch.zeros(1), sequence=torch.zeros(1),
    )  # fmt: skip
    moved = batch._each(lambda tensor: tensor + 1).attention
    assert moved.kind == "documents" and moved.documents is not None
    assert rule.documents is not None and rule.columns is not None
    assert torch.equal(moved.documents.starts, rule.documents.starts + 1)
    assert moved.documents.longest == rule.documents.longest
    assert moved.documents.causal == rule.documents.causal
    assert torch.equal(moved.columns, rule.columns + 1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("heads", HEADS[:2], ids=str)
@pytest.mark.parametrize(
    ("kernel", "name"), [*ON_FLASH, *((k, n) for k in ("sdpa", "flex") for n in CASES)]
)
def test_kernels_on_a_gpu(kernel: str, name: str, heads: tuple[int, int]) -> None:
    """bfloat16 kernels are no further from float64 than three times unfused bfloat16 attention."""
    _, rule = CASES[name]
    call = Call("cuda", torch.bfloat16, 64)
    on_flash = kernel not in ("sdpa", "flex")
    if on_flash:
        problem = flash.obstacle(kernel, call.device, call.dtype, call.head_size, call.dropout)
        if problem is not None:
            pytest.skip(f"{kernel}: {problem}")
    on_gpu = TrainBatch(
        ids=torch.zeros(1), positions=torch.zeros(1), attention=rule, noise_level=None, rows=None,
        targets=torch.zeros(1), weight=torch.zeros(1), sequence=torch.zeros(1),
    ).to(torch.device("cuda"))  # fmt: skip
    exact = [x.detach().cuda().bfloat16().double() for x in inputs(rule, *heads, 64)]
    exact = [*(x.requires_grad_() for x in exact[:3]), exact[3]]
    rounded = [x.detach().bfloat16() for x in exact]
    rounded = [*(x.requires_grad_() for x in rounded[:3]), rounded[3]]
    length = exact[0].shape[0]
    mask = readable(rule, ROWS, length)
    expected = gradients(reference(*exact[:3], mask), exact)
    plain = gradients(reference(*rounded[:3], mask), rounded)
    if on_flash:
        plan = AttentionPlan(on_gpu.attention, kernel)  # type: ignore[arg-type]
    else:
        plan = plan_attention(on_gpu.attention, kernel, call, ROWS, length)  # type: ignore[arg-type]
    ours = gradients(attend(*rounded[:3], plan), rounded)
    for name_, a, b, c in zip(("output", "dq", "dk", "dv"), ours, expected, plain, strict=True):
        error, usual = ((x.double() - b).norm() / b.norm() for x in (a, c))
        assert error <= 3 * usual + 1e-3, f"{name_}: {error:.2e}, unfused {usual:.2e}"
