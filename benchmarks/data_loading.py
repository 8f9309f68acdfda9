"""Reading speed of token pools beside their peers, in one run, on the same tokens.

    python benchmarks/data_loading.py --out benchmarks/results/data_loading

Every reader delivers the same tokens as int64 [8, 2048] batches from a warm page cache and runs in
a process of its own: a first pass warms up (imports, page tables), four more are measured; the
first batch is that of the cold process, imports but torch's included; mapped files count as
memory. The figure to compare is tokens per
CPU-second (own process and children); wall-clock depends on what else the machine does. `numpy
memmap, random` is the physical limit: one fancy index and one cast a batch. Peers that cannot be
used here (`pip install 'epochal[bench]'` brings them) are left out by name.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

SEQ_LENGTH, BATCH = 2048, 8
SHARD_BYTES = 32 << 20
GROUP = 256
PASSES = 4


def tokens_file(root: Path) -> Path:
    """The same tokens as one flat file."""
    return root / "tokens.bin"


def write_pool(tokens: np.ndarray, folder: Path) -> None:
    """A `tokens-tar/1` pool of `tokens`."""
    from data_pipeline.shards.files import write_atomically
    from data_pipeline.shards.manifest import (
        DocumentIndex,
        Manifest,
        PackingRecord,
        RoundTrip,
        SourceRecord,
        SplitRule,
        TokenizerRecord,
    )
    from data_pipeline.shards.shards import MEMBER_BYTES, ShardLayout, write_shard

    folder.mkdir(parents=True)
    layout = ShardLayout("train", np.dtype("<u2"), MEMBER_BYTES // 2, SHARD_BYTES // MEMBER_BYTES)
    count = -(-len(tokens) // layout.shard_tokens)
    shards = [
        write_shard(folder, layout, i, lambda a, b: tokens[a:b], len(tokens)) for i in range(count)
    ]
    (folder / "documents.bin").write_bytes(b"")
    tokenizer = TokenizerRecord(
        kind="sentencepiece",
        sha256="0" * 64,
        pieces_sha256="0" * 64,
        vocab_size=32000,
        pad_id=0,
        mask_id=4,
        doc_id=5,
        never_targets=(0, 1, 2, 3, 4),
    )
    source = SourceRecord(name="random", license="-", documents=1, raw_bytes=1, tokens=len(tokens))
    empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    manifest = Manifest(
        split="train",
        dtype="<u2",
        tokens=len(tokens),
        raw_bytes=1,
        member_tokens=layout.member_tokens,
        members_per_shard=layout.members_per_shard,
        tokenizer=tokenizer,
        packing=PackingRecord(seed=0),
        split_rule=SplitRule(validation_below="0x0"),
        round_trip=RoundTrip(checked=0, failed=0),
        sources=(source,),
        shards=tuple(shards),
        documents=DocumentIndex(count=0, sha256=empty),
    )
    write_atomically(folder / "manifest.json", manifest.to_json())


def write_webdataset(tokens: np.ndarray, folder: Path, group: int) -> None:
    """webdataset's own writer, `group` sequences a member."""
    import webdataset

    folder.mkdir(parents=True)
    rows = tokens.reshape(-1, SEQ_LENGTH)
    pattern = str(folder / "s-%06d.tar")
    with webdataset.ShardWriter(pattern, maxsize=SHARD_BYTES, maxcount=10**9, verbose=0) as sink:
        for i in range(0, len(rows), group):
            sink.write({"__key__": f"{i:09d}", "tok.bin": rows[i : i + group].tobytes()})


def write_litdata(tokens: np.ndarray, folder: Path) -> None:
    """LitData chunks for its TokensLoader."""
    import torch
    from litdata.streaming.cache import Cache
    from litdata.streaming.item_loader import TokensLoader

    folder.mkdir(parents=True)
    chunk = SHARD_BYTES // 2 // SEQ_LENGTH * SEQ_LENGTH
    cache = Cache(str(folder), chunk_size=chunk, item_loader=TokensLoader(block_size=SEQ_LENGTH))
    step = GROUP * SEQ_LENGTH
    for number, start in enumerate(range(0, len(tokens), step)):
        cache[number] = torch.from_numpy(tokens[start : start + step])
    cache.done()
    cache.merge()


def write_mosaic(tokens: np.ndarray, folder: Path) -> None:
    """MosaicML shards, one sequence a sample."""
    from streaming import MDSWriter

    columns = {"tokens": f"ndarray:uint16:{SEQ_LENGTH}"}
    with MDSWriter(out=str(folder), columns=columns, size_limit=SHARD_BYTES) as sink:
        for row in tokens.reshape(-1, SEQ_LENGTH):
            sink.write({"tokens": row})


def read_memmap(root: Path, *, shuffle: bool) -> Iterator[Any]:
    """The physical limit."""
    import torch

    rows = np.memmap(tokens_file(root), "<u2", "r").reshape(-1, SEQ_LENGTH)
    for epoch in range(PASSES + 1):
        rng = np.random.default_rng(epoch)
        order = rng.permutation(len(rows)) if shuffle else np.arange(len(rows))
        for i in range(0, len(rows), BATCH):
            yield torch.from_numpy(rows[order[i : i + BATCH]].astype(np.int64))


def read_epochal(root: Path, **options: Any) -> Iterator[Any]:
    """This project's loader, global shuffle."""
    import torch

    from data_pipeline.shards.pool import TokenPool
    from data_pipeline.stream.budget import Budget
    from data_pipeline.stream.loader import BudgetLoader, TokenStream

    pool = TokenPool(root / "epochal" / "manifest.json", verify="size")
    budget = Budget(None, SEQ_LENGTH, pool.num_tokens)
    stream = TokenStream(pool, budget, seed=1, epochs=PASSES + 1)
    sizes = {"global_batch_size": BATCH, "micro_batch_size": BATCH, "dp_rank": 0, "dp_size": 1}
    for batch in BudgetLoader(stream, **sizes, **options):
        yield torch.from_numpy(batch.micro_batches[0].tokens)


def read_webdataset(root: Path, *, name: str) -> Iterator[Any]:
    """Plain webdataset, sequential, as its documentation shows."""
    import torch
    import webdataset

    urls = sorted(str(p) for p in (root / name).glob("*.tar"))

    def sequences(samples: Any) -> Any:
        for sample in samples:
            yield from np.frombuffer(sample["tok.bin"], "<u2").reshape(-1, SEQ_LENGTH)

    def collate(rows: Any) -> Any:
        return torch.from_numpy(np.stack(rows).astype(np.int64))

    data = webdataset.WebDataset(urls, shardshuffle=False, empty_check=False).compose(sequences)
    for _ in range(PASSES + 1):
        yield from data.batched(BATCH, collation_fn=collate, partial=False)


def read_litdata(root: Path) -> Iterator[Any]:
    """LitData's StreamingDataset, shuffled."""
    import torch
    from litdata import StreamingDataset, TokensLoader

    loader = TokensLoader(block_size=SEQ_LENGTH)
    data = StreamingDataset(str(root / "litdata"), item_loader=loader, shuffle=True)
    rows: list[Any] = []
    for row in (row for _ in range(PASSES + 1) for row in data):
        rows.append(np.asarray(row))
        if len(rows) == BATCH:
            yield torch.from_numpy(np.stack(rows).astype(np.int64))
            rows = []


def read_mosaic(root: Path) -> Iterator[Any]:
    """MosaicML's StreamingDataset, shuffled."""
    import torch
    from streaming import StreamingDataset

    data = StreamingDataset(local=str(root / "mosaic"), shuffle=True, batch_size=BATCH)
    rows: list[Any] = []
    for sample in (sample for _ in range(PASSES + 1) for sample in data):
        rows.append(sample["tokens"])
        if len(rows) == BATCH:
            yield torch.from_numpy(np.stack(rows).astype(np.int64))
            rows = []


READERS: dict[str, tuple[str | None, Callable[[Path], Iterator[Any]]]] = {
    "numpy memmap, random": (None, lambda r: read_memmap(r, shuffle=True)),
    "numpy memmap, sequential": (None, lambda r: read_memmap(r, shuffle=False)),
    "epochal, global shuffle": (None, lambda r: read_epochal(r, prefetch=0)),
    "epochal, prefetch thread": (None, lambda r: read_epochal(r, prefetch=2)),
    "epochal, 2 workers": (None, lambda r: read_epochal(r, prefetch=2, workers=2)),
    "webdataset, 256 a member": ("webdataset", lambda r: read_webdataset(r, name="wds-group")),
    "webdataset, 1 a member": ("webdataset", lambda r: read_webdataset(r, name="wds-single")),
    "LitData": ("litdata", read_litdata),
    "MosaicML Streaming": ("streaming", read_mosaic),
}


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


def prepare_sets(root: Path, count: int) -> dict[str, str]:
    """Write every format that can be written; the reason for each that cannot."""
    tokens = np.random.default_rng(0).integers(
        6, 32000, count // (GROUP * SEQ_LENGTH) * GROUP * SEQ_LENGTH
    )
    tokens = tokens.astype("<u2")
    root.mkdir(parents=True, exist_ok=True)
    tokens.tofile(tokens_file(root))
    missing = {}
    writers: dict[str, Callable[[Path], None]] = {
        "epochal": lambda p: write_pool(tokens, p),
        "wds-group": lambda p: write_webdataset(tokens, p, GROUP),
        "wds-single": lambda p: write_webdataset(tokens, p, 1),
        "litdata": lambda p: write_litdata(tokens, p),
        "mosaic": lambda p: write_mosaic(tokens, p),
    }
    for name, write in writers.items():
        if (root / name).exists():
            continue
        try:
            write(root / name)
        except Exception as error:  # a peer that cannot be used is named, not fatal
            missing[name] = f"{type(error).__name__}: {error}"
            shutil.rmtree(root / name, ignore_errors=True)
    return missing


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


def write_results(out: Path, results: dict[str, dict[str, float]], missing: dict[str, str]) -> None:
    """A JSON file, a table in Markdown and a bar chart."""
    out.parent.mkdir(parents=True, exist_ok=True)
    limit = _rate(results["numpy memmap, random"], "cpu")
    lines = [
        "| reader | Mtok/CPU-s | share of the limit | Mtok/s wall | first batch | peak memory |",
        "|---|---|---|---|---|---|",
    ]
    for name, run in results.items():
        cpu, wall = _rate(run, "cpu"), _rate(run, "wall")
        lines.append(
            f"| {name} | {cpu:.1f} | {cpu / limit:.3f} | {wall:.1f} | "
            f"{run['first'] * 1e3:.0f} ms | {run['peak'] / 1e6:.0f} MB |"
        )
    lines += [f"\n{name} was left out: {reason}" for name, reason in missing.items()]
    out.with_suffix(".md").write_text("\n".join(lines) + "\n")
    about = {"machine": platform.processor() or platform.machine(), "python": sys.version}
    out.with_suffix(".json").write_text(json.dumps({**about, "results": results}, indent=1))
    print("\n".join(lines))
    _draw(out.with_suffix(".png"), results)


def _rate(run: dict[str, float], clock: str) -> float:
    return run["tokens"] / run[clock] / 1e6


def _draw(path: Path, results: dict[str, dict[str, float]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(results)[::-1]
    figure, axes = pyplot.subplots(figsize=(8, 4))
    bars = axes.barh(names, [_rate(results[name], "cpu") for name in names])
    axes.bar_label(bars, fmt="%.0f", padding=3)
    axes.set_xscale("log")
    axes.set_xlim(right=4000)
    axes.set_xlabel("million tokens per CPU-second, batches of 8 x 2048")
    figure.tight_layout()
    figure.savefig(path, dpi=150)


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
