"""Attention by torch's scaled_dot_product_attention: on any device, by a dense mask where needed.

The mask costs a byte for each pair of positions, and work is wasted where the mask is sparse. In
return nothing is compiled, and every device has a backward pass.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend

_NAMES = {
    SDPBackend.MATH: "unfused",
    SDPBackend.FLASH_ATTENTION: "flash",
    SDPBackend.EFFICIENT_ATTENTION: "memory-efficient",
    SDPBackend.CUDNN_ATTENTION: "cuDNN",
}


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, dropout_p: float
) -> Tensor:
    """Attention of q [s, b, heads, d] over k, v [s, b, groups, d]; mask bool [b, 1, s, s] or
    None."""
    q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))  # [b, heads, s, d]
    share = q.shape[1] // k.shape[1]
    if share > 1 and q.is_cuda and (mask is not None or q.dtype == torch.float32):
        # The only fused CUDA kernel for such calls has no groups; others store all scores.
        k, v = k.repeat_interleave(share, dim=1), v.repeat_interleave(share, dim=1)
    out = F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        dropout_p=dropout_p,
        is_causal=causal,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return out.permute(2, 0, 1, 3)


def backend_name(
    device: str, dtype: torch.dtype, head_size: int, *, causal: bool, masked: bool, dropout: bool
) -> str:
    """Name of the backend that torch would choose for such a call.

    The question is asked with short inputs that require gradients, in the model's memory layout.
    """
    x = torch.empty(128, 1, 1, head_size, dtype=dtype, device=device, requires_grad=True)
    q = x.permute(1, 2, 0, 3)
    mask = torch.ones(1, 1, 128, 128, dtype=torch.bool, device=device) if masked else None
    chosen = torch._fused_sdp_choice(q, q, q, mask, 0.1 if dropout else 0.0, causal)
    return _NAMES.get(SDPBackend(chosen), "unknown")
