"""Rates that a GPU reaches without the project: copies, products of a model's shapes, attention.

    python benchmarks/gpu_day/facts.py --json FILE [--device cpu]

Half a minute. Rates of products are those of bfloat16 on random data; of attention, forward and
backward in the memory layout of the model. `--device cpu` takes tiny sizes and proves the script.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

PRODUCTS = (
    (8192, 8192),
    (2176, 6528),
    (2176, 2176),
    (2176, 8704),
    (8704, 2176),
    (2176, 32768),
    (768, 2304),
    (768, 4096),
    (2048, 768),
    (1024, 5632),
)
"""Inputs and outputs of a large square and of the matrices of 1.7b, 127m and medium."""
HEADS = ((17, 128), (16, 64), (12, 64))
"""Heads and their size in the same models."""


def synchronise(device: torch.device) -> None:
    """Wait until the device is idle."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds_of(work: Callable[[], Any], device: torch.device, count: int = 20) -> float:
    """Mean seconds of `count` calls, enqueued one after the other once three have warmed up."""
    for _ in range(3):
        work()
    synchronise(device)
    start = time.perf_counter()
    for _ in range(count):
        work()
    synchronise(device)
    return (time.perf_counter() - start) / count


def product_rate(device: torch.device, size: int, count: int = 20) -> float:
    """Operations a second of square bfloat16 products."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2.0 * size**3 / seconds_of(lambda: torch.mm(a, b), device, count)


def copy_rate(device: torch.device, elements: int) -> float:
    """Bytes a second, read and written, of a copy of float32 numbers on the device."""
    x = torch.randn(elements, device=device)
    y = torch.empty_like(x)
    return 2 * x.numel() * x.element_size() / seconds_of(lambda: y.copy_(x), device)


def product_rates(device: torch.device, rows: int, inputs: int, outputs: int) -> dict[str, float]:
    """TFLOP/s of a linear layer's three products on `rows` positions."""
    x = torch.randn(rows, inputs, device=device, dtype=torch.bfloat16)
    weight = torch.randn(outputs, inputs, device=device, dtype=torch.bfloat16)
    grad = torch.randn(rows, outputs, device=device, dtype=torch.bfloat16)
    work = 2 * rows * inputs * outputs / 1e12
    return {
        "forward": work / seconds_of(lambda: x @ weight.t(), device),
        "to_input": work / seconds_of(lambda: grad @ weight, device),
        "to_weight": work / seconds_of(lambda: grad.t() @ x, device),
    }


def attention_rates(
    device: torch.device, batch: int, length: int, heads: int, size: int, causal: bool
) -> dict[str, Any]:
    """TFLOP/s of each kernel behind scaled_dot_product_attention, or why it refuses; and which one
    torch chooses."""
    cuda = device.type == "cuda"
    # Laid out as the model does: [s, b, heads, size], seen as [b, heads, s, size].
    q, k, v, grad = (
        torch.randn(length, batch, heads, size, device=device, dtype=torch.bfloat16).permute(
            1, 2, 0, 3
        )
        for _ in range(4)
    )
    for x in (q, k, v):
        x.requires_grad_()

    def both() -> None:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        torch.autograd.grad(out, (q, k, v), grad)

    # Two products forward, five backward.
    work = 3.5 * 4 * batch * heads * length**2 * size * (0.5 if causal else 1.0) / 1e12
    chosen = SDPBackend(torch._fused_sdp_choice(q, k, v, None, 0.0, causal)).name
    rates: dict[str, Any] = {"chosen": chosen}
    kernels = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION)
    for backend in kernels if cuda else (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH):
        try:
            with sdpa_kernel(backend):
                rates[backend.name] = work / seconds_of(both, device)
        except Exception as error:
            rates[backend.name] = f"{type(error).__name__}: {str(error)[:80]}"
    with torch.no_grad():
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    rates["output_in_layout_of_model"] = out.permute(2, 0, 1, 3).is_contiguous()
    return rates


def plan(device: torch.device) -> Iterator[tuple[str, str, Callable[[], Any]]]:
    """(section, name, measurement); sizes on a CPU are small enough for a second."""
    cuda = device.type == "cuda"
    scale = 1 if cuda else 64
    yield "copy", "tb_s", lambda: copy_rate(device, (1 << 29) // scale**2) / 1e12
    rows = 16384 // scale
    for inputs, outputs in PRODUCTS if cuda else PRODUCTS[:2]:
        i, o = inputs // scale, outputs // scale
        work = functools.partial(product_rates, device, rows, i, o)
        yield "products_tflops", f"{rows}x{i}x{o}", work
    batch, length = (8, 2048) if cuda else (1, 64)
    for heads, size in HEADS if cuda else HEADS[-1:]:
        for causal in (True, False):
            work = functools.partial(attention_rates, device, batch, length, heads, size, causal)
            name = f"{heads} heads of {size}, {'causal' if causal else 'bidirectional'}"
            yield "attention_tflops", name, work


def properties(device: torch.device) -> dict[str, Any]:
    """Name, memory and versions."""
    if device.type != "cuda":
        return {"torch": torch.__version__, "device": device.type}
    found = torch.cuda.get_device_properties(0)
    return {
        "torch": torch.__version__,
        "device": found.name,
        "memory_gib": found.total_memory / 2**30,
        "multiprocessors": found.multi_processor_count,
        "cudnn": torch.backends.cudnn.version(),
    }


def main() -> int:
    """Measure and print one after the other, and write JSON; 3 where there is no GPU."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("torch sees no NVIDIA GPU; --device cpu proves the script", file=sys.stderr)
        return 3
    device = torch.device(arguments.device)
    found: dict[str, Any] = properties(device)
    print(found, flush=True)
    for section, name, work in plan(device):
        try:
            value = work()
        except Exception as error:
            value = f"{type(error).__name__}: {str(error)[:200]}"
        found.setdefault(section, {})[name] = value
        print(section, name, value, flush=True)
        if arguments.json:
            arguments.json.write_text(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
