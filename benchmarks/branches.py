"""Branches of one long run against separate runs of the same lengths: losses and cost.

    python benchmarks/branches.py --corpus FOLDER [--out FOLDER] [--csv FILE]
    python benchmarks/branches.py --table FILE

For each objective and seed a trunk at constant rate is trained, and one decay for each length; runs
of the same lengths with a cosine schedule are trained separately, and for the first seed also the
separate runs whose schedule the branches have. The validation bound at the end of each run goes to
a CSV file, with the FLOPs that were spent on it. A start after an interruption goes on where it
stopped. `--table` repeats the table from such a file.
"""

from __future__ import annotations

import argparse
import csv
import json
import multiprocessing
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from learning_curves import prepare_corpus
from record import commit, hardware

from cluster.status import read_status
from data_pipeline.prepare.prepare import PreparedData
from data_pipeline.stream.budget import Budget
from pretrain.config.compose import compose
from pretrain.config.preflight import preflight
from pretrain.config.run import Config
from pretrain.study.runner.branches import Branches, split
from pretrain.training.start import write_run

UNIQUE_TOKENS, SEQUENCE, BATCH, WARMUP = 40_000, 64, 8, 20
LENGTHS = Branches(epochs=(1, 2, 4, 8), decay=0.2)
SEEDS = (17, 18, 19)
OBJECTIVES = {"autoregressive": 3e-3, "masked": 3e-3}
"""Learning rate of each objective."""
SHARED = (
    "model.num_layers=2",
    "model.hidden_size=64",
    "model.num_attention_heads=4",
    "model.qk_norm=true",
    f"data.seq_length={SEQUENCE}",
    f"data.unique_tokens={UNIQUE_TOKENS}",
    "data.verify=size",
    f"optimizer.schedule.warmup={WARMUP}",
    f"train.global_batch_size={BATCH}",
    "train.log_interval=50",
    "train.async_checkpoint=false",
    "train.keep_checkpoints=1",
    "parallel=single",
    "evaluation.draws=8",
    "evaluation.sequences=256",
    "tracking=jsonl",
    "run.device=cpu",
)
"""Settings of all runs; the rest are defaults."""
COLUMNS = ("objective", "seed", "kind", "epochs", "loss", "noise_error", "flops", "positions")


def main() -> None:
    """Prepare, train what is missing, write the numbers, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--corpus", default="builtin", help="files or folder of text")
    parser.add_argument("--out", type=Path, default=Path("runs/branches"))
    parser.add_argument("--csv", type=Path, default=Path("docs/images/branches.csv"))
    parser.add_argument("--table", type=Path, metavar="CSV", help="only print the table of this")
    arguments = parser.parse_args()
    if not arguments.table:
        data = prepare_corpus(arguments.corpus, arguments.out / "pool")
        rows = [row for _, row in measured(data, arguments.out / "runs")]
        write(rows, arguments.csv)
    print(table(arguments.table or arguments.csv))


def measured(data: PreparedData, root: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Train every run that is missing; folder and row of each."""
    sequences = Budget(UNIQUE_TOKENS, SEQUENCE, UNIQUE_TOKENS).sequences
    parts = split(LENGTHS, sequences_per_epoch=sequences, batch_size=BATCH, warmup=WARMUP)
    for objective in OBJECTIVES:
        for seed in SEEDS:
            folder = root / f"{objective}-{seed}"
            for part in parts.all:
                kind = "trunk" if part.is_trunk else "branch"
                values = part.values(folder / "trunk")
                spent = part.stop - part.start
                yield one(data, folder / part.name, objective, seed, kind, values, spent)
            for part in parts.branches:
                spent = part.stop
                name, values = f"cosine-{part.name}", {"data.epochs": part.overrides["data.epochs"]}
                yield one(data, folder / name, objective, seed, "cosine", values, spent)
                if seed == SEEDS[0]:
                    name, values = f"wsd-{part.name}", dict(part.overrides)
                    yield one(data, folder / name, objective, seed, "wsd", values, spent)


def one(
    data: PreparedData,
    run: Path,
    objective: str,
    seed: int,
    kind: str,
    values: dict[str, Any],
    positions: int,
) -> tuple[Path, dict[str, Any]]:
    """Train one run unless it is finished; its folder and row."""
    status = read_status(run)
    if status is None or status["state"] != "finished":
        train(configuration(data, run, objective, seed, values))
    lines = (run / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    last = [r for r in records if "validation/nats_per_token" in r][-1]
    return run, {
        "objective": objective,
        "seed": seed,
        "kind": kind,
        "epochs": values["data.epochs"],
        "loss": last["validation/nats_per_token"],
        "noise_error": last["validation/noise_error"],
        "flops": last["train/flops"],
        "positions": positions,
    }


def configuration(
    data: PreparedData, run: Path, objective: str, seed: int, values: dict[str, Any]
) -> Config:
    """Checked configuration of one run."""
    given = {
        "optimizer.lr": OBJECTIVES[objective],
        "run.dir": run,
        "run.seed": seed,
        "data.train": data.train,
        "data.validation": data.validation,
        "data.tokenizer": data.tokenizer,
        **values,
    }
    overrides = [f"{key}={value}" for key, value in given.items()]
    return preflight(compose([f"objective={objective}", *SHARED, *overrides]))


def train(config: Config) -> None:
    """Train in a forked process: what this one has imported is not imported again."""
    saved = write_run(config)
    process = multiprocessing.get_context("fork").Process(target=_train, args=(saved,))
    process.start()
    process.join()
    if process.exitcode:
        sys.exit(process.exitcode)


def _train(saved: Path) -> None:
    from pretrain.train import main as train_main

    sys.exit(train_main(["--config", str(saved)]))


def write(rows: list[dict[str, Any]], path: Path) -> None:
    """CSV with one comment line that says with what it was measured."""
    with path.open("w", newline="") as file:
        file.write(f"# {' '.join(['python', *sys.argv])}; {hardware()}, commit {commit()}\n")
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def table(path: Path) -> str:
    """Markdown: mean losses and differences by objective and length, and the cost."""
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    rows = list(csv.DictReader(lines))
    text = [
        "| objective | epochs | branch | separate, cosine | difference | spread of seeds |"
        " largest difference to the separate run of the same schedule |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for objective in OBJECTIVES:
        for epochs in LENGTHS.epochs:
            found = {
                kind: {
                    int(r["seed"]): float(r["loss"])
                    for r in rows
                    if (r["objective"], r["kind"], float(r["epochs"])) == (objective, kind, epochs)
                }
                for kind in ("branch", "cosine", "wsd")
            }
            branch, cosine = (np.array(list(found[k].values())) for k in ("branch", "cosine"))
            difference, count = branch - cosine, len(branch)
            same = max(abs(loss - found["branch"][seed]) for seed, loss in found["wsd"].items())
            text.append(
                f"| {objective} | {epochs:g} | {branch.mean():.4f} | {cosine.mean():.4f} "
                f"| {difference.mean():+.4f} ± {difference.std(ddof=1) / count**0.5:.4f} "
                f"| {cosine.std(ddof=1):.4f} | {same:g} |"
            )
    ours = sum(int(r["positions"]) for r in rows if r["kind"] in ("trunk", "branch"))
    separate = sum(int(r["positions"]) for r in rows if r["kind"] == "cosine")
    text.append(f"\nTrunk and branches: {ours / separate:.1%} of the FLOPs of the separate runs.")
    return "\n".join(text)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
