"""Core attention behind one interface: the rule says who reads whom, the kernel is chosen once.

flash-attn on NVIDIA GPUs where it is installed, torch's SDPA everywhere else; the general rule of
columns goes through SDPA with a mask. The choice is made at construction and can be printed.
"""

from __future__ import annotations

import importlib.util
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.batch import AttentionRule
from pretrain.errors import ConfigError

Kernel = Literal["sdpa", "flash"]


def choose_kernel(wanted: Literal["auto", "sdpa", "flash"]) -> Kernel:
    """The kernel for this machine; raises ConfigError where `flash` is asked for and missing."""
    usable = torch.cuda.is_available() and importlib.util.find_spec("flash_attn") is not None
    if wanted == "flash" and not usable:
        raise ConfigError(
            "model.attention=flash needs an NVIDIA GPU and the package flash-attn "
            "(pip install 'epochal[gpu]'); model.attention=auto takes SDPA here"
        )
    return "flash" if usable and wanted != "sdpa" else "sdpa"


def attend(q: Tensor, k: Tensor, v: Tensor, rule: AttentionRule, kernel: Kernel) -> Tensor:
    """Attention of q [s, b, heads, d] over k, v [s, b, groups, d] -> [s, b, heads, d].

    `rule` says who reads whom; its mask (rule "columns") is built here and only here.
    """
    if kernel == "flash" and rule.kind != "columns":
        from flash_attn import flash_attn_func

        batch_first = [x.transpose(0, 1) for x in (q, k, v)]
        out: Tensor = flash_attn_func(*batch_first, causal=rule.kind == "causal")
        return out.transpose(0, 1)
    q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))  # [b, heads, s, d]
    mask = rule.mask() if rule.kind == "columns" else None
    out = F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        is_causal=rule.kind == "causal",
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return out.permute(2, 0, 1, 3)
