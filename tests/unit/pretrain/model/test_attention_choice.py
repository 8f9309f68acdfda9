"""Which kernel is taken where: a table over packages, devices and rules, and what is said of it."""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from attention_cases import clean_batch, family

from pretrain.config.objectives import objectives
from pretrain.errors import ConfigError
from pretrain.model.attention import Call, choose_kernel, describe_kernels, flash
from pretrain.noise.key import NoiseKey

KINDS = ("causal", "bidirectional", "documents", "columns")
GPU = Call("cuda", torch.bfloat16, 64)
NEEDED = {"distillation": {"round_sequences": 30}}
"""Fields without which an objective cannot be."""
ABSENT = "it is not installed"
TWO, FOUR, VARLEN, FLEX, SDPA = "flash_attn_2", "flash_attn_4", "torch_varlen", "flex", "sdpa"


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Pretend that these flash kernels are installed, on a GPU of this compute capability."""

    def pretend(*kernels: str, capability: int = 9) -> None:
        choose_kernel.cache_clear()
        found = dict.fromkeys(kernels, (print, print))
        monkeypatch.setattr(flash, "_load", lambda kernel: found.get(kernel, ABSENT))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (capability, 0))

    yield pretend
    choose_kernel.cache_clear()


@pytest.mark.parametrize(
    ("installed", "capability", "call", "taken"),
    [
        ((TWO, FOUR, VARLEN), 9, GPU, (FOUR, FOUR, FOUR, FLEX)),
        ((TWO, FOUR, VARLEN), 8, GPU, (TWO, TWO, TWO, FLEX)),
        ((TWO, VARLEN), 9, GPU, (TWO, TWO, TWO, FLEX)),
        ((VARLEN,), 9, GPU, (SDPA, SDPA, VARLEN, FLEX)),
        ((), 9, GPU, (SDPA, SDPA, FLEX, FLEX)),
        ((TWO, FOUR, VARLEN), 7, GPU, (SDPA, SDPA, FLEX, FLEX)),
        ((TWO, FOUR, VARLEN), 10, Call("cuda", torch.bfloat16, 192), (TWO, TWO, TWO, FLEX)),
        ((TWO, FOUR, VARLEN), 9, Call("cuda", torch.bfloat16, 320), (SDPA, SDPA, FLEX, FLEX)),
        ((TWO, FOUR, VARLEN), 9, Call("cuda", torch.bfloat16, 8), (FOUR, FOUR, FOUR, SDPA)),
        ((TWO, FOUR, VARLEN), 9, Call("cuda", torch.bfloat16, 12), (SDPA,) * 4),
        ((TWO, FOUR, VARLEN), 9, Call("cuda", torch.float32, 64), (SDPA, SDPA, FLEX, FLEX)),
        ((TWO, FOUR, VARLEN), 9, Call("cuda", torch.bfloat16, 64, 0.1), (TWO, TWO, TWO, SDPA)),
        ((FOUR, VARLEN), 9, Call("cuda", torch.bfloat16, 64, 0.1), (SDPA,) * 4),
        ((TWO, FOUR, VARLEN), 9, Call("cpu", torch.bfloat16, 64), (SDPA,) * 4),
    ],
)
def test_auto_takes_the_first_that_can(
    machine: Any, installed: tuple[str, ...], capability: int, call: Call, taken: tuple[str, ...]
) -> None:
    machine(*installed, capability=capability)
    assert tuple(choose_kernel("auto", kind, call) for kind in KINDS) == taken
    assert {choose_kernel("sdpa", kind, call) for kind in KINDS} == {"sdpa"}


def test_flash_is_taken_where_a_rule_allows_it(machine: Any) -> None:
    machine(TWO)
    taken = [choose_kernel("flash", kind, GPU) for kind in KINDS]
    assert taken == [TWO, TWO, TWO, FLEX]


@pytest.mark.parametrize(
    ("installed", "call", "words"),
    [
        ((), GPU, r"flash-attn-4: it is not installed; flash-attn: .*; set model.attention=auto"),
        ((VARLEN,), GPU, "it is not installed"),
        ((TWO,), Call("cpu", torch.bfloat16, 64), "it needs an NVIDIA GPU"),
        (
            (TWO,),
            Call("cuda", torch.float32, 64),
            "not in float32; set train.precision to bfloat16",
        ),
        ((TWO,), Call("cuda", torch.bfloat16, 320), "at most 256 wide, not 320"),
        ((FOUR,), Call("cuda", torch.bfloat16, 64, 0.1), "it has no attention dropout"),
    ],
)
def test_flash_that_cannot_be_used_is_refused_with_the_reason(
    machine: Any, installed: tuple[str, ...], call: Call, words: str
) -> None:
    machine(*installed)
    with pytest.raises(ConfigError, match=words):
        choose_kernel("flash", "causal", call)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            Call("cuda", torch.bfloat16, 64, 0.1),
            "cannot drop attention weights, .*is 0.1; .*sdpa",
        ),
        (Call("cuda", torch.bfloat16, 8), "at least 16 wide, not 8"),
    ],
)
def test_flex_that_cannot_be_used_is_refused_with_the_reason(call: Call, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        choose_kernel("flex", "columns", call)


def test_a_broken_package_is_a_reason_and_not_a_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise OSError("undefined symbol: _ZN3c104cuda")

    monkeypatch.setattr(flash.importlib, "import_module", broken)
    flash._load.cache_clear()
    try:
        assert flash._load("flash_attn_2") == (
            "it cannot be imported (OSError: undefined symbol: _ZN3c104cuda)"
        )
    finally:
        flash._load.cache_clear()


def test_a_version_that_lacks_an_argument_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    old = types.SimpleNamespace(
        flash_attn_func=print,
        flash_attn_varlen_func=lambda q, k, v, cu_seqlens_q, max_seqlen_q, causal: q,
    )
    monkeypatch.setattr(flash.importlib, "import_module", lambda name: old)
    flash._load.cache_clear()
    try:
        said = flash._load("flash_attn_2")
        assert said == "its version is too old: it does not take deterministic, dropout_p"
    finally:
        flash._load.cache_clear()


def test_the_kernels_are_named_by_rule(machine: Any) -> None:
    machine(TWO)
    assert describe_kernels("auto", ("documents",), GPU) == "flash-attn"
    said = describe_kernels("auto", ("causal", "documents", "columns"), GPU)
    assert said == "flash-attn for causal and documents, FlexAttention for block masks"


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        *((name, NEEDED.get(name, {})) for name in objectives.names()),
        ("autoregressive", {"hide": "tokens"}),
    ],
)
@pytest.mark.parametrize("documents", [False, True])
def test_objectives_declare_the_kinds_of_their_rules(
    name: str, fields: dict[str, Any], documents: bool
) -> None:
    """What a run says about its kernels is about the rules that it then has."""
    objective = family(name, **fields)
    declared = set(objective.attention_kinds(documents))
    made = set()
    for short in (False, True):
        clean = clean_batch(documents, short)
        for make in (objective.corrupt, objective.bound_batch):
            made.add(make(clean, NoiseKey(3, clean.position)).attention.kind)
    assert made == declared


def test_sdpa_names_the_backend_that_torch_takes() -> None:
    """Asked of torch, whose flash kernel on a CPU has no dropout."""
    call = Call("cpu", torch.float32, 16)
    assert describe_kernels("auto", ("causal", "columns"), call) == "SDPA (flash)"
    call = Call("cpu", torch.float32, 16, dropout=0.1)
    assert describe_kernels("auto", ("causal",), call) == "SDPA (unfused)"
