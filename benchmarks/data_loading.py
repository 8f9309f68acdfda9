"""Reading speed of token pools beside their peers, in one run, on the same tokens.

    python benchmarks/data_loading.py --out benchmarks/results/data_loading

Every reader delivers the same tokens as int64 [8, 2048] batches from a warm page cache and runs in
a process of its own: a first pass warms up (imports, page tables), four more are measured. The
first batch is that of the cold process, with all imports but torch's; mapped files count as memory.

The figure to compare is tokens per CPU-second (this process and its children); wall-clock depends
on the other work of the machine. `numpy memmap, random` is the physical limit: one fancy index and
one cast a batch. Peers that cannot be used here (`pip install 'epochal[bench]'` brings them) are
left out by name. `loaders/` holds the formats, the readers and the report.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

from loaders.formats import prepare_sets, tokens_file
from loaders.readers import READERS
from loaders.report import write_results


def measure(name: str, root: Path) -> dict[str, float]:
    """A pass to warm up, whose first batch is timed, then `PASSES` passes that are measured."""
    began = time.perf_counter()
    first, tokens, warm = 0.0, 0, tokens_file(root).stat().st_size // 2
    for batch in READERS[name][1](root):
        tokens += batch.numel()
        if not first:
            first = time.perf_counter() - began
        if tokens - batch.numel() < warm <= tokens:
            started, cpu, before = time.perf_counter(), _cpu_seconds(), tokens
    seconds, used = time.perf_counter() - started, _cpu_seconds() - cpu
    tokens -= before
    peak = _peak_bytes()
    return {"tokens": tokens, "wall": seconds, "cpu": used, "first": first, "peak": peak}


def _peak_bytes() -> float:
    """Largest resident memory of this program (getrusage would count the parent's before exec)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return float(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmHWM")


def _cpu_seconds() -> float:
    both = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return sum(u.ru_utime + u.ru_stime for u in map(resource.getrusage, both))


def stub_torchvision() -> None:
    """MosaicML imports torchvision, whose wheels often do not match the installed torch."""
    import types

    names = ("torchvision", "torchvision.datasets", "torchvision.transforms")
    for name in (*names, "torchvision.transforms.functional"):
        module = types.ModuleType(name)
        module.VisionDataset = type("VisionDataset", (), {})  # type: ignore[attr-defined]
        module.to_tensor = None  # type: ignore[attr-defined]
        module.__spec__ = importlib.util.spec_from_loader(name, None)
        sys.modules[name] = module


def run_all(root: Path, repeats: int) -> dict[str, dict[str, float]]:
    """Measure every reader `repeats` times, interleaved; medians by CPU time."""
    samples: dict[str, list[dict[str, float]]] = {}
    for _ in range(repeats):
        for name, (module, _reader) in READERS.items():
            if module is not None and importlib.util.find_spec(module) is None:
                continue
            command = [sys.executable, __file__, "--root", str(root), "--measure", name]
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=300)
            except subprocess.TimeoutExpired:
                print(f"{name}: more than 300 s, left out", flush=True)
                continue
            if done.returncode == 0:
                result = json.loads(done.stdout.splitlines()[-1])
                samples.setdefault(name, []).append(result)
                print(
                    f"{name}: {result['tokens'] / result['cpu'] / 1e6:.1f} Mtok/CPU-s", flush=True
                )
            else:
                print(f"{name}: {done.stderr.strip().splitlines()[-1:]}", flush=True)
    return {
        name: sorted(runs, key=lambda run: run["cpu"])[len(runs) // 2]
        for name, runs in samples.items()
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, default=Path("/tmp/epochal-data-loading"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/data_loading"))
    parser.add_argument("--tokens", type=int, default=60_000_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--measure", metavar="READER", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    stub_torchvision()
    if chosen.measure:
        import torch

        torch.set_num_threads(1)
        print(json.dumps(measure(chosen.measure, chosen.root)))
        return
    missing = prepare_sets(chosen.root, chosen.tokens)
    write_results(chosen.out, run_all(chosen.root, chosen.repeats), missing)


if __name__ == "__main__":
    main()
