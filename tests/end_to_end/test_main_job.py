"""Text to likelihoods and samples through the installed command."""

from __future__ import annotations

import itertools
import json
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
from installed import EPOCHAL, ONE_EPOCH, environment


def test_a_preempted_run_resumes_and_is_evaluated_and_sampled(
    epochal, program, rank, overrides: list[str], tmp_path: Path
):
    """SIGTERM -> saved, exit code 75, although the tracker hangs; the same command finishes, on two
    ranks along the curve of one that nothing disturbs, and every budgeted sequence was visited as
    often as promised."""
    run = tmp_path / "r"
    settings = [*overrides, "objective=masked", "data.epochs=6", "train.eval_epochs=[1]"]
    settings += ["train.log_interval=1"]
    command = ["train", *settings, "parallel.data_parallel_size=2", "tracking.mlflow=true"]
    log = (tmp_path / "log").open("w+")
    with socket.create_server(("127.0.0.1", 0)) as silent:  # a tracker that never answers
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        first = subprocess.Popen(
            [EPOCHAL, *command, "--tracking-uri", uri], stdout=log, stderr=log, env=environment()
        )
        wait_for_step(run, 5, first)
        first.send_signal(signal.SIGTERM)
        assert first.wait(timeout=120) == 75, Path(log.name).read_text()
    status = json.loads((run / "status.json").read_text())
    assert status["state"] == "preempted"
    assert 5 <= status["step"] < 150
    saved = run / "checkpoints" / f"step-{status['step']:08d}"
    assert saved.is_dir()

    second = epochal(*command)
    assert second.returncode == 0, second.stdout + second.stderr
    assert f"resumed from {saved}" in second.stdout
    assert json.loads((run / "status.json").read_text())["step"] == 150
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    covered = [(r["position_start"], r["position_stop"]) for r in records if "train/loss" in r]
    assert len(covered) == 150
    assert covered[0][0] == 0
    assert covered[-1][1] == 1200  # 200 sequences, six times
    assert all(a[1] == b[0] for a, b in itertools.pairwise(covered))

    alone = rank(*settings, f"run.dir={tmp_path / 'alone'}", "train.stop_step=30")
    assert alone.returncode == 0, alone.stdout + alone.stderr
    assert_same_curve(run, tmp_path / "alone", 29)

    likelihood = json.loads(program("evaluate", run, "--draws", "2", "--json").stdout)
    assert likelihood["step"] == 150
    last = [r for r in records if "validation/nats_per_token" in r][-1]
    assert likelihood["nats_per_token"] == pytest.approx(last["validation/nats_per_token"], abs=0.2)
    drawn = [program("sample", run, "--num", "2", "--steps", "4", "--json") for _ in range(2)]
    samples = [json.loads(d.stdout) for d in drawn]
    assert "Warning" not in drawn[0].stderr
    assert samples[0] == samples[1]  # the seed is part of the sample
    for sample in samples[0]:
        assert len(sample["tokens"]) == 32
        assert sample["settings"]["checkpoint"] == "step-00000150"
        assert 1 <= sample["network_evaluations"] <= 4
    stored = (run / "samples.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in stored] == samples[0] + samples[1]


def wait_for_step(run: Path, step: int, process: subprocess.Popen, seconds: float = 240) -> None:
    """Return when the run has logged `step`."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        assert process.poll() is None, "the run ended before it could be interrupted"
        log = run / "metrics.jsonl"
        lines = log.read_text().splitlines() if log.exists() else []
        if lines and json.loads(lines[-1])["step"] >= step:
            return
        time.sleep(0.05)
    raise AssertionError(f"step {step} was not reached in {seconds} s")


def test_the_configuration_of_a_run_repeats_it(
    epochal, finished: Path, overrides: list[str], tmp_path: Path
):
    """`--config RUN/config.yaml` in another folder gives the same numbers, bit for bit;
    DeepSpeed's launcher, started by hand, does too."""
    copy = tmp_path / "copy"
    second = epochal("train", "--config", finished / "config.yaml", f"run.dir={copy}")
    assert second.returncode == 0, second.stderr
    direct = tmp_path / "direct"
    command = [EPOCHAL.with_name("deepspeed"), "--num_gpus", "1"]
    command += ["--module", "pretrain.train", *overrides, *ONE_EPOCH, f"run.dir={direct}"]
    env = environment() | {"DS_ACCELERATOR": "cpu"}
    third = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert third.returncode == 0, third.stdout + third.stderr
    weights = [
        (run / "checkpoints" / "step-00000025" / "weights.safetensors").read_bytes()
        for run in (finished, copy, direct)
    ]
    assert weights[0] == weights[1] == weights[2]


@pytest.mark.slow
def test_two_ranks_give_the_one_rank_curve(
    epochal, finished: Path, overrides: list[str], tmp_path: Path
):
    """Data parallel with ZeRO 2 and tensor parallel, started as a user starts them, against one
    rank; tests/distributed/test_training.py covers the other layouts."""
    layouts = {
        "data": ["parallel.data_parallel_size=2", "parallel.zero_stage=2"],
        "tensor": ["parallel.tensor_parallel_size=2", "parallel.zero_stage=1"],
    }
    for name, layout in layouts.items():
        more = [*ONE_EPOCH, *layout, f"run.name={name}"]
        result = epochal("train", *overrides, *more)
        assert result.returncode == 0, result.stdout + result.stderr
        assert_same_curve(tmp_path / name, finished, 25)


def assert_same_curve(run: Path, reference: Path, steps: int) -> None:
    """Losses, norms and evaluations within 1e-5, up to a step."""
    ours, theirs = (
        {k: v for k, v in curve(folder).items() if k[0] <= steps} for folder in (run, reference)
    )
    assert set(ours) == set(theirs)
    assert len([key for key in ours if key[1] == "train/loss"]) == steps
    assert any(key[1] == "validation/nats_per_token" for key in ours)
    for key, value in theirs.items():
        assert ours[key] == pytest.approx(value, rel=1e-5), key


def curve(run: Path) -> dict[tuple[int, str], float]:
    """Losses, gradient norms and evaluations that a run has logged, by step and name."""
    wanted = ("train/loss", "train/grad_norm", "validation/nats_per_token")
    return {
        (record["step"], key): record[key]
        for record in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        for key in wanted
        if key in record
    }
