"""A forward and a backward pass need no value on the host, and send nothing to the device.

On torch's meta device tensors have a shape and no values: whatever would make the host wait for a
GPU (`item`, `nonzero`, a boolean index) raises there. A copy from the host's memory would wait too.
"""

from __future__ import annotations

import pytest
import torch
from small import FAMILIES, build, clean_batch
from torch.utils._python_dispatch import TorchDispatchMode

from pretrain.noise.key import NoiseKey

FURTHER = {
    "orders": {"name": "autoregressive", "orders": 3, "hide": "queries"},
    "curriculum": {
        "name": "uniform",
        "curriculum_sequences": 2,
        "curriculum_temperature": (0.3, 0.05),
    },
    "gaussian": {"name": "gaussian", "reconstruction_share": 0.4},
}
CONVOLVED = {"autoregressive": 4, "masked": 5, "gaussian": 5}
CASES = [(f, chunk) for f in (*FAMILIES, "orders", "curriculum") for chunk in (0, 7)]
META = torch.device("meta")
COPIES = {torch.ops.aten._to_copy, torch.ops.aten.copy_}


class Copies(TorchDispatchMode):
    """Operations that move a tensor of the host to the device."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function.overloadpacket in COPIES and out.device == META:
            source = args[-1] if function.overloadpacket is torch.ops.aten.copy_ else args[0]
            if source.device != META:
                self.found.append(tuple(source.shape))
        return out


def batch_of(module):
    """A training batch of the module's objective, on the host."""
    clean = clean_batch()
    return module.objective.corrupt(clean, NoiseKey(5, clean.position))


@pytest.mark.parametrize(("family", "chunk"), [*CASES, ("gaussian", 0)])
def test_passes_run_where_there_are_no_values(topology, family, chunk):
    module = build(topology, {**FAMILIES, **FURTHER}[family], loss_chunk=chunk)
    batch = batch_of(module).to(META)
    module.to(META)
    with Copies() as copies:
        (module(batch) * 0.5).backward()
    assert not copies.found
    assert all(p.grad is not None and p.grad.device == META for p in module.parameters())


@pytest.mark.parametrize(("family", "kernel"), CONVOLVED.items())
def test_convolutions_need_no_values(topology, family, kernel):
    """One of the rows ends early, so that they have a mask."""
    module = build(topology, {**FAMILIES, **FURTHER}[family], short_convolution=kernel)
    batch = batch_of(module).to(META)
    module.to(META)
    with Copies() as copies:
        module(batch).backward()
    assert not copies.found
    assert all(p.grad is not None and p.grad.device == META for p in module.parameters())


def test_the_meta_device_notices_what_it_should():
    x = torch.ones(3, device=META)
    for reading in (lambda: float(x.sum()), lambda: x[x > 0], lambda: x.nonzero(), x.tolist):
        with pytest.raises((RuntimeError, NotImplementedError)):
            reading()
    with Copies() as copies:
        torch.ones(2).to(META)
        x.copy_(torch.ones(3))
    assert copies.found == [(2,), (3,)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here")
@pytest.mark.parametrize("family", [*FAMILIES, *FURTHER])
def test_cuda_sees_no_wait(topology, family):
    """The second pass: kernels are compiled and memory is taken in the first."""
    device = torch.device("cuda")
    module = build(topology, {**FAMILIES, **FURTHER}[family]).to(device)
    batch = batch_of(module).to(device)
    (module(batch) * 0.5).backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        (module(batch) * 0.5).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
