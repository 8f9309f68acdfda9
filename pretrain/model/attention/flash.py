"""Adapter of flash-attn: the APIs of version 2, of version 4 (CuTe), and of torch's copy.

Whole sequences are passed as they are. Separate documents are packed end to end, and computed
without a mask and without work across their bounds. torch ships the variable-length form of version
2, so documents have a fast kernel where no package is installed.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache
from importlib import metadata
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from pretrain.batch import AttentionRule
from pretrain.config.kernels import FLASH_HEADS, flash_obstacle

_MODULES = {
    "flash_attn_4": "flash_attn.cute",
    "flash_attn_2": "flash_attn",
    "torch_varlen": "torch.nn.attention.varlen",
}
_INSTALL = {"flash_attn_4": "epochal[flash4]", "flash_attn_2": "epochal[gpu]"}
_NEEDED = {
    "flash_attn_4": {"cu_seqlens_q", "max_seqlen_q", "causal", "deterministic"},
    "flash_attn_2": {"cu_seqlens_q", "max_seqlen_q", "causal", "deterministic", "dropout_p"},
    "torch_varlen": {"cu_seq_q", "max_q", "window_size", "enable_gqa"},
}
"""Arguments without which a version is too old."""


def attend(
    q: Tensor, k: Tensor, v: Tensor, rule: AttentionRule, kernel: str, dropout_p: float
) -> Tensor:
    """Attention of q [s, b, heads, d] over k, v [s, b, groups, d], by a rule without general
    columns."""
    batch_first = [x.transpose(0, 1) for x in (q, k, v)]
    options: dict[str, Any] = {}
    if kernel != "torch_varlen":
        options["deterministic"] = torch.are_deterministic_algorithms_enabled()
    if kernel == "flash_attn_2":
        options["dropout_p"] = dropout_p
    else:
        assert dropout_p == 0.0, f"{kernel} has no dropout; the choice should have refused it"
    if rule.documents is None:
        out = _whole(kernel)(*batch_first, causal=rule.kind == "causal", **options)
        return _first(out).transpose(0, 1)
    starts, longest = rule.documents.starts, rule.documents.longest
    if kernel == "torch_varlen":
        options["window_size"] = (-1, 0) if rule.documents.causal else (-1, -1)
        options["enable_gqa"] = q.shape[2] != k.shape[2]
        bounds: dict[str, Any] = {"cu_seq_q": starts, "cu_seq_k": starts}
        bounds |= {"max_q": longest, "max_k": longest}
    else:
        options["causal"] = rule.documents.causal
        bounds = {"cu_seqlens_q": starts, "cu_seqlens_k": starts}
        bounds |= {"max_seqlen_q": longest, "max_seqlen_k": longest}
    packed = [x.flatten(0, 1) for x in batch_first]  # [b * s, heads, d]
    out = _first(_variable(kernel)(*packed, **bounds, **options))
    return out.unflatten(0, (q.shape[1], q.shape[0])).transpose(0, 1)


def obstacle(
    kernel: str, device: str, dtype: torch.dtype, head_size: int, dropout: float
) -> str | None:
    """Reason why `kernel` is unavailable for such a call, or None."""
    found = flash_obstacle(device == "cuda", str(dtype).removeprefix("torch."), head_size)
    if found is not None:
        return str(found)
    if dropout > 0 and kernel != "flash_attn_2":
        return "it has no attention dropout"
    generation = torch.cuda.get_device_capability()[0]
    if generation < (9 if kernel == "flash_attn_4" else 8):
        needed = "Hopper or newer" if kernel == "flash_attn_4" else "Ampere or newer"
        return f"it needs a GPU of {needed}"
    if kernel == "flash_attn_4" and generation > 9 and 128 < head_size < FLASH_HEADS:
        return f"on this GPU its heads are at most 128 or exactly 256 wide, not {head_size}"
    problem = _load(kernel)
    return problem if isinstance(problem, str) else None


def version(kernel: str) -> str:
    """Version of the package behind `kernel` with a blank before it; empty where it has none."""
    package = {"flash_attn_4": "flash-attn-4", "flash_attn_2": "flash-attn"}.get(kernel)
    try:
        return f" {metadata.version(package)}" if package else ""
    except metadata.PackageNotFoundError:
        return ""


@cache
def _load(kernel: str) -> tuple[Callable[..., Any] | None, Callable[..., Any]] | str:
    """Functions for whole and for packed sequences, or the reason why there are none.

    Any error counts: a broken optional package must not stop a run that does not need it.
    """
    absent = f"it is not installed (pip install '{_INSTALL.get(kernel, 'torch')}')"
    try:
        module = importlib.import_module(_MODULES[kernel])
    except ModuleNotFoundError:
        return absent
    except Exception as error:
        return f"it cannot be imported ({type(error).__name__}: {error})"
    if kernel == "torch_varlen":
        whole, variable = None, module.varlen_attn
    elif hasattr(module, "flash_attn_func"):
        whole, variable = module.flash_attn_func, module.flash_attn_varlen_func
    else:  # version 4 alone leaves a folder flash_attn with nothing but itself
        return absent
    missing = _NEEDED[kernel] - signature(variable).parameters.keys()
    if missing:
        return f"its version is too old: it does not take {', '.join(sorted(missing))}"
    return whole, variable


def _whole(kernel: str) -> Callable[..., Any]:
    loaded = _load(kernel)
    assert not isinstance(loaded, str) and loaded[0] is not None, kernel
    return loaded[0]


def _variable(kernel: str) -> Callable[..., Any]:
    loaded = _load(kernel)
    assert not isinstance(loaded, str), kernel
    return loaded[1]


def _first(out: Any) -> Tensor:
    """Output alone; version 4 returns the log-sum-exp too."""
    result: Tensor = out[0] if isinstance(out, tuple) else out
    return result
