"""Autoregressive against masked on few unique tokens, both by `pretrain.train` on one GPU at once.

    python benchmarks/gpu_day/science.py --pool FOLDER --seconds 310 --json FILE [--device cpu]

Models of this size leave most of a GPU idle, so that both runs share it. At the deadline SIGTERM
stops them: they save and measure nothing more. Every evaluation until then is in the results. The
pool is a folder of `epochal data prepare TEXTS --out FOLDER --vocab-size 8192`; a token of it is
three to four bytes of text.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

RUNS = ("autoregressive", "masked")
EPOCHS = (24, 160)
"""The autoregressive run overfits long before; the deadline cuts the masked one short."""


def main() -> int:
    """Train until the deadline and write what was measured; 1 where a run measured nothing."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pool", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=310)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--model", default="11m")
    parser.add_argument("--unique-tokens", type=int, default=2_000_000)
    parser.add_argument("--epochs", type=int, nargs=2, default=EPOCHS, help="one number a run")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        train(arguments, root)
        found = {run: measured(root, run) for run in RUNS}
    arguments.json.write_text(json.dumps(found, indent=1))
    for run, result in found.items():
        print(run, f"{len(result['evaluations'])} evaluations", result["log"][-300:])
    return 0 if all(result["evaluations"] for result in found.values()) else 1


def train(arguments: argparse.Namespace, root: Path) -> None:
    """Both runs side by side below `root`, until they end or the time is over."""
    deadline = time.monotonic() + arguments.seconds
    running = []
    for run in RUNS:
        command = [sys.executable, "-m", "pretrain.train", *overrides(run, arguments, root)]
        with (root / f"{run}.log").open("w") as log:
            running.append(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT))
    while time.monotonic() < deadline and any(process.poll() is None for process in running):
        time.sleep(0.5)
    for process in running:
        process.send_signal(signal.SIGTERM)
    for process in running:
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def overrides(run: str, arguments: argparse.Namespace, root: Path) -> list[str]:
    """The configuration of one run."""
    cpu = arguments.device == "cpu"
    batch, length = (8, 64) if cpu else (64, 512)
    epoch = max(1, arguments.unique_tokens // (batch * length))
    compiled = "false" if cpu else "true"
    return [
        f"model={arguments.model}",
        f"objective={run}",
        "tracking=jsonl",
        f"run.root={root}",
        f"run.name={run}",
        f"run.device={arguments.device}",
        f"data.train={arguments.pool.resolve()}/train/manifest.json",
        f"data.validation={arguments.pool.resolve()}/validation/manifest.json",
        f"data.tokenizer={arguments.pool.resolve()}/tokenizer.model",
        f"data.unique_tokens={arguments.unique_tokens}",
        f"data.epochs={arguments.epochs[RUNS.index(run)]}",
        f"data.seq_length={length}",
        f"train.global_batch_size={batch}",
        f"train.precision={'float32' if cpu else 'bfloat16'}",
        f"train.compile={compiled}",
        f"train.compile_loss={compiled}",
        # Often, where the autoregressive run turns; the masked one moves slowly.
        f"train.eval_interval={epoch if run == 'autoregressive' else 4 * epoch}",
        f"evaluation.draws={1 if run == 'autoregressive' else 4}",
        f"evaluation.sequences={16 if cpu else 256}",
        f"evaluation.batch_size={8 if cpu else 64}",
        "parallel.zero_stage=1",
        "optimizer.lr=0.001",
    ]


def measured(root: Path, run: str) -> dict[str, Any]:
    """Evaluations of a run, its last metrics and the end of its output."""
    path = root / run / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    return {
        "evaluations": [line for line in lines if "validation/nats_per_token" in line],
        "last": lines[-3:],
        "log": (root / f"{run}.log").read_text()[-1500:],
    }


if __name__ == "__main__":
    sys.exit(main())
