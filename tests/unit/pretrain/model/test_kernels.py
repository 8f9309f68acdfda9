"""Hand-written forward and backward passes against autograd of the formulas, in float64 and 32."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from pretrain.model import kernels


def plain_rms_norm(x, weight):
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-5) * weight


def plain_rotate(x, cos, sin):
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def plain_swiglu(y):
    gate, up = y.chunk(2, dim=-1)
    return F.silu(gate) * up


def both(fast, plain, *inputs, wanted):
    """Outputs and gradients of the two forms for the same upstream gradient."""
    results = []
    for function in (fast, plain):
        arguments = [x.clone().requires_grad_(i in wanted) for i, x in enumerate(inputs)]
        out = function(*arguments)
        upstream = torch.sin(torch.arange(out.numel()).view(out.shape)).to(out.dtype)
        out.backward(upstream)
        results.append([out.detach(), *[arguments[i].grad for i in wanted]])
    return zip(*results, strict=True)


CASES = {
    "rms_norm": (
        lambda x, w: kernels.rms_norm(x, w, 1e-5),
        plain_rms_norm,
        lambda d: (3 * torch.randn(5, 2, 3, 8, dtype=d), torch.randn(8, dtype=d)),
        (0, 1),
    ),
    "rms_norm of nothing": (
        lambda x, w: kernels.rms_norm(x, w, 1e-5),
        plain_rms_norm,
        lambda d: (torch.zeros(2, 8, dtype=d), torch.randn(8, dtype=d)),
        (0, 1),
    ),
    "rotate": (
        kernels.rotate,
        plain_rotate,
        lambda d: (
            torch.randn(5, 2, 3, 4, 8, dtype=d),
            torch.randn(5, 1, 1, 1, 4, dtype=d),
            torch.randn(5, 1, 1, 1, 4, dtype=d),
        ),
        (0,),
    ),
    "swiglu": (
        kernels.swiglu,
        plain_swiglu,
        lambda d: (3 * torch.randn(5, 2, 14, dtype=d),),
        (0,),
    ),
    "squared_relu": (
        kernels.squared_relu,
        lambda x: F.relu(x).square(),
        lambda d: (3 * torch.randn(5, 2, 14, dtype=d),),
        (0,),
    ),
}


@pytest.mark.parametrize("name", list(CASES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fast_and_plain_form_agree_forward_and_backward(name, dtype):
    torch.manual_seed(0)
    fast, plain, make, wanted = CASES[name]
    tolerance = 2e-5 if dtype == torch.float32 else 1e-12
    for ours, theirs in both(fast, plain, *make(dtype), wanted=wanted):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def test_gradients_against_finite_differences():
    torch.manual_seed(0)
    x, w = torch.randn(3, 6, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    norm = lambda x, w: kernels._RMSNorm.apply(x, w, 1e-5)  # noqa: E731
    assert torch.autograd.gradcheck(norm, (x.requires_grad_(), w.requires_grad_()))
    y = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(kernels.swiglu, (y,))
