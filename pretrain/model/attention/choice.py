"""Choice of the kernel that computes an attention rule in a call, and its description.

    rule of                  with auto on CUDA                              on a CPU
    whole sequences          flash-attn 4, 2, else SDPA                     SDPA
    documents                flash-attn 4, 2, torch's varlen, flex, SDPA    SDPA and a mask
    columns                  flex, else SDPA and a mask                     SDPA and a mask

The first usable kernel is taken. The choice depends only on device, precision and head width of a
call, so that it is made on the host, once.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from pretrain.batch import AttentionKind
from pretrain.config.kernels import flex_obstacle
from pretrain.errors import ConfigError
from pretrain.model.attention import flash, sdpa

Wanted = Literal["auto", "sdpa", "flash", "flex"]
Kernel = Literal["sdpa", "flex", "flash_attn_4", "flash_attn_2", "torch_varlen"]
_RULES = {
    "causal": "causal",
    "bidirectional": "bidirectional",
    "documents": "documents",
    "columns": "block masks",
}
_TITLES = {
    "flex": "FlexAttention",
    "flash_attn_4": "flash-attn-4",
    "flash_attn_2": "flash-attn",
    "torch_varlen": "torch variable-length flash",
}


@dataclass(frozen=True)
class Call:
    """Properties of a call that a kernel must support."""

    device: str
    """Type of the device: `cpu` or `cuda`."""
    dtype: torch.dtype
    head_size: int
    dropout: float = 0.0
    """Probability at which this model drops attention weights in training."""

    @staticmethod
    def like(x: Tensor, head_size: int, dropout: float = 0.0) -> Call:
        """Call of a model whose hidden states are like `x`."""
        return Call(x.device.type, x.dtype, head_size, dropout)


@cache
def choose_kernel(wanted: Wanted, kind: AttentionKind, call: Call) -> Kernel:
    """Choose the kernel for rules of `kind`; raises ConfigError where `wanted` is unavailable.

    `flash` means flash-attn where a rule has no general columns, and else the same as `auto`.
    """
    if wanted == "sdpa":
        return "sdpa"
    if wanted == "flex":
        problem = _obstacle("flex", call)
        if problem is not None:
            raise ConfigError(
                f"model.attention=flex cannot be used here ({problem}); set model.attention to "
                "sdpa, flash or auto"
            )
        return "flex"
    if wanted == "flash":
        problems = {kernel: _obstacle(kernel, call) for kernel in _candidates("causal")}
        if all(problems.values()):
            said = "; ".join(f"{_TITLES[kernel]}: {why}" for kernel, why in problems.items())
            raise ConfigError(
                f"model.attention=flash cannot be used here ({said}); set model.attention=auto"
            )
    if call.device != "cuda":
        return "sdpa"
    usable = (kernel for kernel in _candidates(kind) if _obstacle(kernel, call) is None)
    return next(usable, "sdpa")


def describe_kernels(wanted: Wanted, kinds: Iterable[AttentionKind], call: Call) -> str:
    """Name the kernels of all `kinds`, e.g. "SDPA (cuDNN) for causal, FlexAttention for block
    masks"; a kernel that computes them all is named alone."""
    named: dict[str, list[str]] = {}
    for kind in kinds:
        kernel = choose_kernel(wanted, kind, call)
        named.setdefault(_name(kernel, kind, call), []).append(_RULES[kind])
    if len(named) == 1:
        return next(iter(named))
    return ", ".join(f"{name} for {' and '.join(rules)}" for name, rules in named.items())


def _candidates(kind: AttentionKind) -> tuple[Kernel, ...]:
    """Kernels that can compute rules of `kind` on a GPU, the preferred one first."""
    if kind == "columns":
        return ("flex",)
    if kind == "documents":
        return ("flash_attn_4", "flash_attn_2", "torch_varlen", "flex")
    return ("flash_attn_4", "flash_attn_2")


def _obstacle(kernel: Kernel, call: Call) -> str | None:
    """Reason why `kernel` is unavailable for `call`, or None."""
    if kernel == "sdpa":
        return None
    if kernel == "flex":
        # On a CPU it has a forward pass, which tests take.
        found = flex_obstacle(True, call.head_size, call.dropout)
        return None if found is None else str(found)
    return flash.obstacle(kernel, call.device, call.dtype, call.head_size, call.dropout)


def _name(kernel: Kernel, kind: AttentionKind, call: Call) -> str:
    if kernel != "sdpa":
        return f"{_TITLES[kernel]}{flash.version(kernel)}"
    backend = sdpa.backend_name(
        call.device,
        call.dtype,
        call.head_size,
        causal=kind == "causal",
        masked=kind in ("documents", "columns"),
        dropout=call.dropout > 0,
    )
    return f"SDPA ({backend})"
