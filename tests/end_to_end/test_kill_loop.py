"""Random SIGKILLs of any process of a run, at any moment: the run is that of one nobody killed.

Slow: every start costs the imports. `KILLS` in the environment changes the number of kills.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import pytest
from installed import EPOCHAL, environment

KILLS = int(os.environ.get("KILLS", "15"))
"""Kills of a run on one rank, and of one on two."""
STEPS = 3000
RUN = [
    "objective=masked",
    "data.epochs=120",
    f"train.stop_step={STEPS}",
    "train.checkpoint_interval=20",
    "train.log_interval=4",
    "train.eval_interval=600",
    "train.ema_decay=0.9",
    "tracking.mlflow=true",
]


def start(words: list[str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("ab") as file:
        return subprocess.Popen(
            [EPOCHAL, "train", *words], stdout=file, stderr=file, env=environment()
        )


def family(run: Path) -> list[psutil.Process]:
    """Living processes whose command line names the run."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        words = " ".join(process.info["cmdline"] or [])
        if str(run) in words and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(process)
    return found


def wait_until_all_ended(run: Path, seconds: float = 120) -> None:
    """Ranks whose launcher was killed save and end by themselves."""
    end = time.monotonic() + seconds
    while left := family(run):
        assert time.monotonic() < end, f"left running: {[p.cmdline() for p in left]}"
        time.sleep(0.1)


def kill_one(run: Path, chance: random.Random) -> None:
    """SIGKILL to the process that was started, or to one of its ranks."""
    living = family(run)
    if living:
        victim = chance.choice(sorted(living, key=lambda p: p.pid))
        try:
            victim.kill()
        except psutil.NoSuchProcess:
            return


def rows(run: Path) -> list[dict[str, Any]]:
    """Lines of the log, without times and speeds."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in r.items() if k != "time" and "per_second" not in k} for r in lines]


def assert_same_log(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> None:
    """Each measurement of an undisturbed run once, and no position twice or left out. There are
    further lines where ranks whose launcher was killed saved their checkpoint."""
    edges = [(r["position_start"], r["position_stop"]) for r in ours if "position_stop" in r]
    assert edges[0][0] == 0
    assert all(a[1] == b[0] for a, b in pairwise(edges))
    for row in (*ours, *theirs):
        row.pop("position_start", None)
    found = {(r["step"], "train/loss" in r): r for r in ours}
    assert len(found) == len(ours)
    for row in theirs:
        assert found[row["step"], "train/loss" in row] == row


def mlflow_points(run: Path) -> list[tuple[str, int, float]]:
    """Every point of the run's history on the server, repeated ones too."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{run.parent / 'mlflow.db'}")
    found = client.get_run((run / "mlflow_run_id").read_text().strip())
    return sorted(
        (name, point.step, point.value)
        for name in found.data.metrics
        for point in client.get_metric_history(found.info.run_id, name)
    )


def logged_points(run: Path) -> list[tuple[str, int, float]]:
    """Points of the log; a report and its evaluation share some, which a server gets once."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return sorted(
        {
            (name, row["step"], value)
            for row in lines
            for name, value in row.items()
            if name not in ("step", "time")
        }
    )


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_at_random_moments(ranks: int, overrides: list[str], tmp_path: Path) -> None:
    layout = [f"parallel.data_parallel_size={ranks}", "parallel.zero_stage=1"]
    words = [*overrides, *RUN, *layout]
    whole = start([*words, f"run.dir={tmp_path / 'whole'}"], tmp_path / "whole.log")
    assert whole.wait() == 0, (tmp_path / "whole.log").read_text()

    chance, run = random.Random(ranks), tmp_path / "killed"
    words.append(f"run.dir={run}")
    for number in range(KILLS):
        process = start(words, tmp_path / "log")
        time.sleep(chance.uniform(1.0, 12.0))
        if process.poll() is not None:
            assert process.returncode == 0, (tmp_path / "log").read_text()
            print(f"finished after {number} kills")
            break
        kill_one(run, chance)
        process.wait(timeout=180)
        wait_until_all_ended(run)
    process = start(words, tmp_path / "log")
    assert process.wait(timeout=600) == 0, (tmp_path / "log").read_text()
    wait_until_all_ended(run)

    assert_same_log(rows(run), rows(tmp_path / "whole"))
    last = Path("checkpoints") / f"step-{STEPS:08d}"
    files = sorted(p.name for p in (run / last).glob("*.safetensors"))
    assert files
    for name in files:
        ours, theirs = ((folder / last / name).read_bytes() for folder in (run, tmp_path / "whole"))
        assert ours == theirs, name
    assert mlflow_points(run) == logged_points(run)
