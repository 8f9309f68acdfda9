"""A training step on a GPU: tokens a second, MFU, peak memory, and where the time goes.

    python benchmarks/gpu_step.py [--models 127m medium 1.7b] [--compile on off] [--json FILE]
    python benchmarks/gpu_step.py --plan full --seconds 260 --json FILE --kernels FILE
    python benchmarks/gpu_step.py --dry-run      a tiny shape on the CPU: proves the script, no more

Each row is the step of `epochal train` on one GPU (bfloat16, ZeRO 1, fused AdamW, corruption on the
host while the device works). Rows are those of a plan (`full`, `smoke`, `cpu` in gpu_day/plans, or
a YAML file) or of a grid with ascending micro-batches. A row is written as soon as it is measured;
one that fails is written with its error, and the rest go on. What does not fit is tried with half
the micro-batch and twice the accumulation; after a fault that may be cuDNN's attention, the row is
tried without it, and so are the rows that follow.

Operations are counted from the matrices: backward twice forward, causal attention half, the head
only at rows that carry weight, recomputed work never. MFU is given against the dense bfloat16 rate
of the data sheet and against square products of 8,192 timed in the same run, in a burst and for
three seconds.
"""

from __future__ import annotations

import argparse
import faulthandler
import sys
import time
import traceback
from collections import deque
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from gpu_day.facts import product_rate
from gpu_day.plan import Plan, Row, grid, read_plan
from gpu_day.results import Results
from gpu_day.table import DENSE_TFLOPS, table
from record import commit, hardware

START = time.monotonic()
NO_GPU, START_AGAIN, NOTHING = 3, 4, 5
"""Exit codes: there is no GPU; the GPU is unusable for this process, and rows may be left; every
row failed. A row that takes longer than `--row-seconds` ends the process with 1."""


def main() -> int:
    """Measure, print, and write JSON where asked to."""
    arguments = parse()
    if not (arguments.dry_run or torch.cuda.is_available()):
        print("this benchmark needs an NVIDIA GPU; --dry-run proves it on the CPU", file=sys.stderr)
        return NO_GPU
    device = torch.device("cpu" if arguments.dry_run else "cuda")
    try:
        plan = chosen_plan(arguments)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    earlier = Results.read(arguments.json) if arguments.go_on else {}
    results = Results(arguments.json, {**machine(plan, device), **earlier})
    if not results.found["cudnn"]:
        torch.backends.cuda.enable_cudnn_sdp(False)
    code = measure_rows(plan, device, results, arguments)
    print(table(results.found))
    if arguments.dry_run:
        print("dry run: figures mean nothing")
    return code


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--plan", metavar="NAME", help="full, smoke, cpu or a YAML file, instead of a grid")
    add("--models", nargs="*", default=["127m", "medium", "1.7b"])
    add("--objectives", nargs="*", default=["autoregressive", "masked", "uniform"])
    add("--micro-batches", nargs="*", type=int, default=[4, 8, 16, 32])
    add("--recompute", nargs="*", default=["none"], choices=("none", "selective", "full"))
    add("--compile", nargs="*", default=["off"], choices=("on", "off"))
    add("--compile-loss", nargs="*", default=["off"], choices=("on", "off"))
    add("--accumulate", type=int, default=1, help="micro-batches of an optimizer step")
    add("--length", type=int, default=Plan.length)
    add("--vocabulary", type=int, default=Plan.vocabulary)
    add("--steps", type=int, default=Plan.steps, help="steps that are timed for each row")
    add("--seconds", type=float, default=float("inf"), help="begin no row after so long")
    add("--row-seconds", type=float, help="end the process where a row takes longer")
    add("--json", type=Path, help="results, written after every row")
    add("--go-on", action="store_true", help="keep the rows that the JSON file has")
    add("--kernels", type=Path, help="kernels and host waits of profiled rows, appended")
    add("--dry-run", action="store_true", help="on the CPU; the plan `cpu` unless one is given")
    return parser.parse_args()


def chosen_plan(arguments: argparse.Namespace) -> Plan:
    """The plan of the command line; raises ValueError where it is malformed."""
    if arguments.plan or arguments.dry_run:
        return read_plan(arguments.plan or "cpu")
    rows = grid(
        arguments.models,
        arguments.objectives,
        arguments.recompute,
        [value == "on" for value in arguments.compile],
        [value == "on" for value in arguments.compile_loss],
        arguments.micro_batches,
        arguments.accumulate,
    )
    return Plan(rows, arguments.length, arguments.vocabulary, arguments.steps)


def machine(plan: Plan, device: torch.device) -> dict[str, Any]:
    """Everything that the figures of all rows depend on."""
    size, count = (8192, 2000) if device.type == "cuda" else (64, 20)
    return {
        "device": hardware(device.type),
        "torch": torch.__version__,
        "commit": commit(),
        "length": plan.length,
        "vocabulary": plan.vocabulary,
        "burst_tflops": product_rate(device, size) / 1e12,
        "sustained_tflops": product_rate(device, size, count) / 1e12,
    }


def measure_rows(
    plan: Plan, device: torch.device, results: Results, options: argparse.Namespace
) -> int:
    """Measure the rows that `results` lacks, one engine a model; the exit code."""
    waiting = deque(row for row in plan.rows if results.lacks(row))
    bench = Bench(plan, device, options.kernels)
    while waiting:
        row = waiting.popleft()
        why = "no time left" if time.monotonic() - START > options.seconds else bench.hopeless(row)
        if why:
            results.skip(row, why)
            continue
        entry = results.begin(row)
        if options.row_seconds:  # from a thread of C: also where the driver never answers
            faulthandler.dump_traceback_later(options.row_seconds, exit=True)
        retries, again = bench.measure(row, entry, results.found)
        faulthandler.cancel_dump_traceback_later()
        entry["at_seconds"] = time.monotonic() - START
        results.save()
        print({k: round(v, 4) if isinstance(v, float) else v for k, v in entry.items()}, flush=True)
        if again:
            return START_AGAIN
        waiting.extendleft(retry for retry in retries if results.lacks(retry))
    return 0 if any("seconds" in entry for entry in results.rows) else NOTHING


class Bench:
    """The engine at hand, and what earlier rows taught."""

    def __init__(self, plan: Plan, device: torch.device, kernels: Path | None) -> None:
        self.plan, self.device, self.kernels = plan, device, kernels
        self.steps: Any = None
        self.too_large: dict[tuple[Any, ...], int] = {}
        """Smallest micro-batch that did not fit, by family of rows."""
        self.fitted: set[tuple[Any, ...]] = set()

    def hopeless(self, row: Row) -> str | None:
        """The reason why a row need not be tried, if there is one."""
        limit = self.too_large.get(row.family)
        if limit is None or row.micro_batch < limit:
            return None
        return f"a micro-batch of {limit} did not fit"

    def measure(
        self, row: Row, entry: dict[str, Any], found: dict[str, Any]
    ) -> tuple[list[Row], bool]:
        """Measure a row into its entry, or note its error; rows to try instead.

        The second value is True where this process can measure nothing more.
        """
        entry["cudnn"] = found["cudnn"]
        try:
            self._measure(row, entry)
        except Exception as error:
            entry["error"] = f"{type(error).__name__}: {str(error)[:300]}"
            self.steps = None  # its counters and buffers may be in the middle of a step
            if isinstance(error, torch.OutOfMemoryError):
                self.too_large[row.family] = row.micro_batch
                return self._halved(row), False
            traceback.print_exc()
            unusable = "CUDA error" in entry["error"]
            if self.device.type == "cuda" and isinstance(error, RuntimeError) and found["cudnn"]:
                # The likeliest fault of a first run on a machine is cuDNN's attention.
                torch.backends.cuda.enable_cudnn_sdp(False)
                found["cudnn"], entry["again"] = False, "without cuDNN's attention"
                return [row], unusable
            return [], unusable
        self.fitted.add(row.family)
        if self.device.type == "cuda":
            entry["mfu"] = entry["tflops"] / DENSE_TFLOPS
        return [], False

    def _measure(self, row: Row, entry: dict[str, Any]) -> None:
        from parallel.imports import import_megatron

        import_megatron()  # as a rank does, before a module imports it whole: half the time
        from gpu_day.breakdown import profiled
        from gpu_day.steps import Steps, release

        if self.steps is None or not self.steps.serves(row):
            self.steps = None
            release(self.device)
            begin = time.monotonic()
            self.steps = Steps(row, self.plan, self.device)
            entry["build_seconds"] = time.monotonic() - begin
        self.steps.set(row)
        entry.update(self.steps.measure())
        if row.profile:
            try:
                entry["kernels"] = profiled(self.steps.step, self.device, row.label, self.kernels)
            except Exception as error:  # the figures of the row stand
                entry["profile_error"] = f"{type(error).__name__}: {str(error)[:300]}"
                self.steps = None

    def _halved(self, row: Row) -> list[Row]:
        """The same step in twice as many forward passes, where nothing of the kind has fitted."""
        if row.micro_batch == 1 or row.family in self.fitted:
            return []
        half = row.micro_batch // 2
        return [replace(row, micro_batch=half, accumulate=2 * row.accumulate)]


if __name__ == "__main__":
    sys.exit(main())
