"""Time from the command to the first optimizer step: the demo's model on ranks of this machine.

    python benchmarks/first_step.py [--ranks 2] [--repeats 3]
    python benchmarks/first_step.py --checkouts . ../before

Wall-clock seconds until `epochal train` has printed the first step, and CPU seconds that it
and all its processes have used until then, which depend less on what else the machine does.
`--checkouts` times several versions in turns, each in its git worktree, with the packages that
this Python has installed. Every rank gets one thread; files come from a warm disk cache, because
a first run is not counted.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path

import psutil

from data_pipeline.prepare.prepare import prepare
from data_pipeline.prepare.settings import PrepareSettings, TokenizerSettings

STEP = re.compile(r"step 1/")


@dataclass(frozen=True)
class Start:
    """Seconds of one start."""

    ranks: float
    """Wall-clock seconds until the ranks were started."""
    step: float
    """Wall-clock seconds until the first step was printed."""
    cpu: float
    """CPU seconds of all processes until then."""


def overrides(pool: Path, ranks: int) -> list[str]:
    """One step of the demo's masked diffusion model."""
    return [
        "runs=demo",
        "objective=masked",
        "run.device=cpu",
        f"parallel.data_parallel_size={ranks}",
        f"data.train={pool / 'train' / 'manifest.json'}",
        f"data.validation={pool / 'validation' / 'manifest.json'}",
        f"data.tokenizer={pool / 'tokenizer.model'}",
        "data.epochs=1",
        "train.log_interval=1",
        "train.stop_step=1",
        "evaluation.sequences=2",
    ]


def command_of(checkout: Path) -> list[str]:
    """Command that runs the `epochal` of a checkout; the entry point is in its pyproject.toml."""
    project = tomllib.loads((checkout / "pyproject.toml").read_text())
    module, function = project["project"]["scripts"]["epochal"].split(":")
    return [sys.executable, "-c", f"from {module} import {function} as main; main()"]


def cpu_seconds(process: psutil.Process) -> float:
    """CPU seconds of a process, of its living descendants, and of those that were waited for."""
    total = 0.0
    for one in [process, *process.children(recursive=True)]:
        times = one.cpu_times()
        total += times.user + times.system + times.children_user + times.children_system
    return total


def measure(checkout: Path, arguments: list[str], folder: Path) -> Start:
    """Start a run in an empty folder and wait for its first step, then for its end."""
    folder.mkdir()
    begin = time.perf_counter()
    process = subprocess.Popen(
        [*command_of(checkout), "train", *arguments, f"run.root={folder}", "run.name=run"],
        cwd=folder,  # Python would import the packages of the current directory first
        env={**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    watched = psutil.Process(process.pid)
    assert process.stdout is not None
    lines: list[str] = []
    started: float | None = None
    found: Start | None = None
    for line in process.stdout:
        lines.append(line)
        now = time.perf_counter() - begin
        started = now if started is None else started
        if found is None and STEP.match(line):
            found = Start(started, now, cpu_seconds(watched))
    if process.wait() or found is None:
        sys.exit(f"{checkout} did not train:\n{''.join(lines)}")
    return found


def main() -> None:
    """Print a row for every checkout."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    here = Path(__file__).parents[1]
    parser.add_argument("--checkouts", nargs="+", type=Path, default=[here], help="folders")
    options = parser.parse_args()
    checkouts = [checkout.resolve() for checkout in options.checkouts]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer = TokenizerSettings(model_type="bpe", vocab_size=2048)
        prepare(PrepareSettings(out=folder / "pool", tokenizer=tokenizer, validation_fraction=0.05))
        arguments = overrides(folder / "pool", options.ranks)
        starts: dict[Path, list[Start]] = {checkout: [] for checkout in checkouts}
        for repeat in range(options.repeats + 1):
            for number, checkout in enumerate(checkouts):
                run = folder / f"{number}-{repeat}"
                starts[checkout].append(measure(checkout, arguments, run))
    print(f"{options.ranks} ranks, {os.cpu_count()} cores, medians of {options.repeats}")
    print(f"{'ranks started':>14}{'first step':>12}{'CPU':>8}   seconds until then")
    for checkout, found in starts.items():
        counted = found[1:]
        ranks, step, cpu = (
            statistics.median(getattr(s, part) for s in counted)
            for part in ("ranks", "step", "cpu")
        )
        print(f"{ranks:>14.1f}{step:>12.1f}{cpu:>8.1f}   {checkout}")


if __name__ == "__main__":
    main()
