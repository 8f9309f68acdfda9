"""Runs killed at random moments: metrics.jsonl and MLflow have each measurement once."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import runs
from harness import run_ranks


def train(pool: Path, root: Path, seconds: float | None, epochs: float) -> int:
    """A slow small run with a sqlite store in `root`; it dies `seconds` after its first step."""
    from pretrain import train
    from pretrain.training import hooks

    original = hooks.Hooks.after_step
    timers: list[threading.Timer] = []

    def after_step(self, *arguments):
        if seconds is not None and not timers:
            timers.append(threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL)))
            timers[0].start()
        time.sleep(0.1)
        original(self, *arguments)

    hooks.Hooks.after_step = after_step
    more = [f"run.root={root}", "tracking.mlflow=true", f"data.epochs={epochs}"]
    more += ["train.keep_checkpoints=2"]
    return train.main(runs.overrides(pool, root / "run", *more))


def points(root: Path) -> list[list[tuple[str, float, int, int]]]:
    """Points (name, value, milliseconds, step) of the active MLflow runs, repeats included."""
    from mlflow.tracking import MlflowClient

    from pretrain.config.trackers import sqlite_uri

    client = MlflowClient(sqlite_uri(root / "mlflow.db"))
    experiment = client.get_experiment_by_name("epochal")
    assert experiment is not None
    found = []
    for run in client.search_runs([experiment.experiment_id]):
        assert run.info.status == "FINISHED"
        histories = [client.get_metric_history(run.info.run_id, n) for n in run.data.metrics]
        found.append([(m.key, m.value, m.timestamp, m.step) for h in histories for m in h])
    return found


def recorded(run: Path) -> dict[tuple[str, int], tuple[float, int]]:
    """Value and milliseconds by name and step, read without the package; the first of each."""
    found: dict[tuple[str, int], tuple[float, int]] = {}
    losses = []
    for line in (run / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        losses += [row["step"]] if "train/loss" in row else []
        for name in row.keys() - {"step", "time"}:
            ms = round(row["time"] * 1000)
            found.setdefault((name, row["step"]), (float(row[name]), ms))
    assert losses == list(range(1, len(losses) + 1))
    return found


@pytest.mark.parametrize(
    ("kills", "epochs"), [(2, 8), pytest.param(10, 30, marks=pytest.mark.slow)]
)
def test_every_measurement_arrives_once_however_often_a_run_is_killed(
    pool: Path, tmp_path: Path, kills: int, epochs: float
):
    rng = random.Random(kills)
    for kill in range(kills):
        # From before the store is made to the middle of sending.
        seconds = rng.uniform(0.3, 4 if kills == 2 else 10)
        code = run_ranks(1, train, pool, tmp_path, seconds, epochs, launcher=False, may_die=True)
        print(f"kill {kill} after {seconds:.1f} s: {code}", file=sys.stderr)
    assert run_ranks(1, train, pool, tmp_path, None, epochs, launcher=False) == [0]
    (sent,) = points(tmp_path)
    record = recorded(tmp_path / "run")
    assert len(sent) == len({(name, step) for name, _, _, step in sent})
    assert {(name, step): (value, ms) for name, value, ms, step in sent} == record
