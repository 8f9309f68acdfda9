"""The SLURM template on a real SLURM: it trains, refuses, and comes back after a preemption."""

from __future__ import annotations

import json
import pydoc_data.topics
import sys
from pathlib import Path
from time import monotonic, sleep
from typing import Protocol

import pytest
from typer.testing import CliRunner

from pretrain.cli.main import app
from pretrain.tracking.jsonl import read_metrics

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(3600)]
SCRIPT = Path(__file__).resolve().parents[2] / "cluster" / "slurm" / "train.sbatch"
PATIENCE = 1200.0
"""Seconds until a job counts as hung: on a busy machine the imports alone take minutes."""
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}


class Slurm(Protocol):
    """What this file uses of the fixture."""

    def command(self, *arguments: str, cwd: Path | None = None) -> str: ...

    def job(self, number: str) -> dict[str, str]: ...


@pytest.fixture(scope="module")
def overrides(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A small pool and a model that takes a few seconds for 60 steps."""
    folder = tmp_path_factory.mktemp("pool")
    text = folder / "text.txt"
    text.write_text("\n\n".join(pydoc_data.topics.topics.values()))
    done = CliRunner().invoke(
        app, ["data", "prepare", str(text), "--out", str(folder), "--vocab-size", "400",
              "--model-type", "bpe", "--chunk-characters", "2000", "--validation-fraction", "0.1",
              "--workers", "1"],
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    return [
        f"data.train={folder}/train/manifest.json", f"data.tokenizer={folder}/tokenizer.model",
        f"data.validation={folder}/validation/manifest.json", "data.seq_length=64",
        "data.unique_tokens=4096", "data.epochs=15", "train.global_batch_size=16",
        "train.log_interval=1", "model.num_layers=2", "model.hidden_size=64",
        "model.num_attention_heads=2", "objective=masked", "evaluation.sequences=8",
        "tracking=jsonl", "run.device=cpu",
    ]  # fmt: skip


def submit(slurm: Slurm, folder: Path, *arguments: str) -> str:
    """Number of a job of two ranks, submitted from `folder`."""
    out = slurm.command(
        "sbatch", "--parsable", "--ntasks-per-node=2", "--gpus-per-node=0", "--cpus-per-task=1",
        "--time=120", "--output=job.out", f"--export=ALL,EPOCHAL_VENV={sys.prefix}",
        str(SCRIPT), *arguments, cwd=folder,
    )  # fmt: skip
    return out.strip()


def wait_until(slurm: Slurm, job: str, states: set[str], log: Path) -> dict[str, str]:
    end = monotonic() + PATIENCE
    while (about := slurm.job(job))["JobState"] not in states:
        assert monotonic() < end, log.read_text() if log.exists() else about
        sleep(0.5)
    return about


def test_a_preempted_job_comes_back_and_equals_an_undisturbed_one(
    slurm: Slurm, overrides: list[str], tmp_path: Path
) -> None:
    log = tmp_path / "job.out"
    job = submit(slurm, tmp_path, "run.name=whole", *overrides)
    about = wait_until(slurm, job, ENDED, log)
    assert about["JobState"] == "COMPLETED", log.read_text()
    whole = read_metrics(tmp_path / "runs" / "whole" / "metrics.jsonl")
    log.unlink()

    job = submit(slurm, tmp_path, "run.name=parts", *overrides)
    metrics = tmp_path / "runs" / "parts" / "metrics.jsonl"
    end = monotonic() + PATIENCE
    while not metrics.exists() or len(read_metrics(metrics)) < 10:
        assert monotonic() < end, log.read_text()
        sleep(0.05)
    slurm.command("scancel", "--batch", "--signal=USR1", job)
    about = wait_until(slurm, job, ENDED, log)
    text = log.read_text()
    assert about["JobState"] == "COMPLETED", text
    assert about["Restarts"] == "1", text
    assert "saved; back to the queue" in text
    assert "resumed from" in text

    def losses(rows: list[dict[str, float]]) -> list[tuple[float, float]]:
        return [(row["step"], row["train/loss"]) for row in rows if "train/loss" in row]

    assert losses(read_metrics(metrics)) == losses(whole)
    assert len(losses(whole)) == 60
    saved = (tmp_path / "runs" / "parts" / "config.yaml").read_text()
    assert "data_parallel_size: 2" in saved


def test_a_mistake_ends_the_job_before_any_rank_starts(slurm: Slurm, tmp_path: Path) -> None:
    log = tmp_path / "job.out"
    job = submit(slurm, tmp_path, "optimizer.learning_rate=1")
    about = wait_until(slurm, job, ENDED, log)
    assert (about["JobState"], about["ExitCode"]) == ("FAILED", "2:0")
    assert log.read_text() == (
        "error: unknown key optimizer.learning_rate; did you mean optimizer.lr?\n"
    )


def test_ranks_that_die_fail_the_job_and_take_each_other_along(
    slurm: Slurm, overrides: list[str], tmp_path: Path
) -> None:
    log = tmp_path / "job.out"
    job = submit(slurm, tmp_path, "run.name=dies", *overrides, "data.epochs=1000")
    status = tmp_path / "runs" / "dies" / "status.json"
    end = monotonic() + PATIENCE
    while not status.exists() or json.loads(status.read_text())["state"] != "running":
        assert monotonic() < end, log.read_text()
        sleep(0.1)
    slurm.command("scancel", "--signal=KILL", f"{job}.0")
    about = wait_until(slurm, job, ENDED, log)
    assert about["JobState"] == "FAILED", log.read_text()
    assert about["Restarts"] == "0"
