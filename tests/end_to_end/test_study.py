"""Studies through the installed command: executed, resumed, collected, killed at random."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from installed import EPOCHAL, environment

KILLS = int(os.environ.get("KILLS", "10"))
SMALL = [
    "model.num_layers=2",
    "model.hidden_size=16",
    "model.num_attention_heads=2",
    "data.seq_length=32",
    "data.unique_tokens=1024",
    "train.global_batch_size=8",
    "train.log_interval=4",
    "evaluation.sequences=16",
    "evaluation.draws=2",
    "tracking.mlflow=false",
    "run.device=cpu",
]


def study_file(pool: Path, path: Path, **values: Any) -> Path:
    """A study of small runs on the pool."""
    files = [
        f"data.train={pool / 'train' / 'manifest.json'}",
        f"data.validation={pool / 'validation' / 'manifest.json'}",
        f"data.tokenizer={pool / 'tokenizer.model'}",
    ]
    base = [*SMALL, *files, *values.pop("base", ())]
    about = {"name": "small", "learning_rate": "one for all", "base": base, **values}
    path.write_text(yaml.safe_dump(about, sort_keys=False))
    return path


def test_a_study_with_a_run_that_fails(epochal, program, pool: Path, tmp_path: Path) -> None:
    """The other run is finished; the failure is named, and the same command would try it again."""
    file = study_file(
        pool,
        tmp_path / "s.yaml",
        base=["objective=masked", "train.eval_interval=4"],
        arms={"good": {}, "bad": {"set": ["optimizer.lr=1e30", "optimizer.min_lr=1e30"]}},
        grid={"data.epochs": [2]},
    )
    folder = tmp_path / "study"
    planned = json.loads(program("study", "plan", file, "--dir", folder, "--json").stdout)
    assert [run["run"] for run in planned["runs"]] == ["good,epochs=2", "bad,epochs=2"]
    assert planned["total"]["tokens"] == 2 * 2 * 1024

    done = epochal("study", "run", file, "--dir", folder, "--jobs", "2")
    assert done.returncode == 5, done.stdout + done.stderr
    assert "finished good,epochs=2 at step 8 (1 of 2)" in done.stdout
    failure = f"failed: {folder / 'runs' / 'bad,epochs=2'}: TrainingError: step "
    assert failure in done.stderr.replace("\n", "")
    assert "Traceback" not in done.stdout + done.stderr

    status = json.loads(program("study", "status", folder, "--json").stdout)
    good, bad = status["runs"]
    assert (good["state"], good["step"]) == ("finished", 8)
    assert bad["state"] == "failed"
    again = program("study", "run", folder, "--dry-run")
    assert "1 of 2 runs would be started" in again.stdout

    collected = program("study", "collect", folder)
    assert collected.returncode == 0, collected.stderr
    rows = (folder / "table.csv").read_text().splitlines()
    assert len(rows) == 3  # at steps 4 and 8
    refused = program("study", "run", folder, "optimizer.weight_decay=0.5")
    assert refused.returncode == 2
    assert "optimizer.weight_decay: the run has 0.1, given 0.5" in refused.stderr


def test_a_sweep_is_shown_before_it_starts(program, pool: Path, tmp_path: Path) -> None:
    file = study_file(pool, tmp_path / "s.yaml")
    base = yaml.safe_load(file.read_text())["base"]
    words = ["train", "--multirun", "objective=autoregressive,masked", "optimizer.lr=1e-3,3e-3"]
    shown = program(*words, *base, f"run.root={tmp_path}", "run.name=rates", "--dry-run", "--json")
    assert shown.returncode == 0, shown.stderr
    told = json.loads(shown.stdout)
    assert told["study"] == str(tmp_path / "rates")
    assert [run["run"] for run in told["runs"]] == [
        f"objective={family},lr={rate}"
        for family in ("autoregressive", "masked")
        for rate in ("0.001", "0.003")
    ]
    refused = program(*words, "--prepare")
    assert (refused.returncode, "--prepare cannot be given" in refused.stderr) == (2, True)


def start(file: Path, folder: Path) -> subprocess.Popen[bytes]:
    command = [EPOCHAL, "study", "run", file, "--dir", folder, "--jobs", "2"]
    with folder.with_suffix(".log").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment())


def family(folder: Path) -> list[psutil.Process]:
    """Living processes whose command line names the study."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        words = " ".join(process.info["cmdline"] or [])
        if str(folder) in words and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(process)
    return sorted(found, key=lambda p: p.pid)


def wait_until_all_ended(folder: Path, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while left := family(folder):
        assert time.monotonic() < end, f"left running: {[p.cmdline() for p in left]}"
        time.sleep(0.1)


def kill_one(folder: Path, front: int, chance: random.Random) -> bool:
    """SIGKILL to the command or, as often, to a rank; True where it was the command."""
    living = [p for p in family(folder) if p.pid != front]
    victim = chance.choice(living) if living and chance.random() < 0.5 else psutil.Process(front)
    victim.kill()
    return victim.pid == front


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_a_study_killed_at_random_moments_has_the_same_table(
    epochal, pool: Path, tmp_path: Path
) -> None:
    file = study_file(
        pool,
        tmp_path / "s.yaml",
        base=[
            "optimizer.lr=1e-2",
            "train.eval_interval=50",
            "train.checkpoint_interval=25",
            "train.keep_checkpoints=1",
        ],
        arms={
            "AR": {"set": ["objective=autoregressive"]},
            "masked": {"set": ["objective=masked", "train.keep_best=true"]},
        },
        grid={"run.seed": [1, 2], "data.epochs": [400]},
        stopping={"patience": 8},
    )
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert start(file, whole).wait(timeout=600) == 0, whole.with_suffix(".log").read_text()

    chance, kills = random.Random(0), 0
    front = start(file, killed)
    while kills < KILLS:
        time.sleep(chance.uniform(0.5, 9.0))
        code = front.poll()
        if code is None:
            kills += 1
            if not kill_one(killed, front.pid, chance):
                continue
            front.wait(timeout=60)
            if chance.random() < 0.5:  # else the next start finds ranks that save and end
                wait_until_all_ended(killed)
        elif code == 0:
            break
        else:  # ranks were killed, and the other runs are done
            assert code == 5, killed.with_suffix(".log").read_text()
        front = start(file, killed)
    print(f"{kills} kills")
    if (code := front.wait(timeout=600)) == 5:
        code = start(file, killed).wait(timeout=600)
    assert code == 0, killed.with_suffix(".log").read_text()
    wait_until_all_ended(killed)

    for folder in (whole, killed):
        assert epochal("study", "collect", folder).returncode == 0
    for kind in ("csv", "parquet"):
        ours, theirs = ((f / f"table.{kind}").read_bytes() for f in (killed, whole))
        assert ours == theirs, kind
    states = [json.loads(p.read_text()) for p in sorted(whole.glob("runs/*/status.json"))]
    assert len(states) == 4
    assert any(state["message"] for state in states)  # the rule has ended some of them
    for name in ("status.json", "checkpoints", "best"):
        assert listing(killed, name) == listing(whole, name)


def listing(folder: Path, name: str) -> list[str]:
    """Content of a statement, or names in a folder, of every run."""
    found = []
    for path in sorted(folder.glob(f"runs/*/{name}")):
        inside = path.read_text() if path.is_file() else sorted(p.name for p in path.glob("step-*"))
        found.append(f"{path.parent.name}: {inside}")
    return found


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_signal_stops_a_study_and_the_same_command_goes_on(pool: Path, tmp_path: Path) -> None:
    file = study_file(
        pool,
        tmp_path / "s.yaml",
        base=["train.log_interval=1", "train.eval_interval=100"],
        grid={"objective": ["autoregressive", "masked"], "data.epochs": [200]},
    )
    folder = tmp_path / "study"
    front = start(file, folder)
    while not all(p.stat().st_size for p in folder.glob("runs/*/metrics.jsonl")) or (
        len([*folder.glob("runs/*/metrics.jsonl")]) < 2
    ):
        assert front.poll() is None, folder.with_suffix(".log").read_text()
        time.sleep(0.1)
    front.send_signal(signal.SIGINT)
    assert front.wait(timeout=120) == 75, folder.with_suffix(".log").read_text()
    wait_until_all_ended(folder, 10)
    states = [json.loads(p.read_text()) for p in folder.glob("runs/*/status.json")]
    assert [state["state"] for state in states] == ["preempted"] * 2
    assert all((folder / "runs").glob("*/checkpoints/step-*"))
    assert start(file, folder).wait(timeout=300) == 0, folder.with_suffix(".log").read_text()
    states = [json.loads(p.read_text()) for p in folder.glob("runs/*/status.json")]
    assert [(state["state"], state["step"]) for state in states] == [("finished", 800)] * 2
