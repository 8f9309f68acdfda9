"""The way of benchmarks/gpu_day/run.sh, walked on the CPU with a tiny model."""

import json
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import yaml

FAILS = {"model": "no_such_model", "objective": "masked", "micro_batch": 2}
RATES = ("seconds", "tokens_per_second", "tflops", "warm_up_seconds", "corruption_seconds")


def run(root, out, **settings):
    """run.sh as a user starts it, from another folder."""
    path = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "OUT": str(out), "PYTHON": sys.executable, "PYTHONPATH": path, **settings}
    env["CARRY"] = str(out / "nothing_carried")
    script = root / "benchmarks" / "gpu_day" / "run.sh"
    return subprocess.run(
        ["bash", str(script)], env=env, cwd=out.parent, capture_output=True, text=True
    )


def test_every_row_is_measured_beside_one_that_fails(root, tmp_path):
    packaged = yaml.safe_load((root / "benchmarks/gpu_day/plans/cpu.yaml").read_text())
    good = packaged["rows"]
    plan = tmp_path / "plan.yaml"
    plan.write_text(yaml.safe_dump({**packaged, "rows": [good[0], FAILS, *good[1:]]}))
    out = tmp_path / "out"
    result = run(root, out, CPU="1", PLAN=str(plan))
    assert result.returncode == 0, (out / "log.txt").read_text()[-3000:]

    facts = json.loads((out / "facts.json").read_text())
    assert facts["copy"]["tb_s"] > 0
    for section in ("products_tflops", "attention_tflops"):
        assert facts[section]
        assert all(isinstance(rates, dict) for rates in facts[section].values()), facts[section]

    found = json.loads((out / "rows.json").read_text())
    first, failed, *rest = found["rows"]
    assert failed["model"] == FAILS["model"] and "no_such_model" in failed["error"]
    assert "seconds" not in failed
    assert len(rest) == len(good) - 1
    for entry, wanted in zip([first, *rest], good, strict=True):
        assert {key: entry[key] for key in wanted} == wanted
        assert "error" not in entry and "profile_error" not in entry
        assert all(entry[name] > 0 for name in RATES)
        assert 0 < entry["loss_first"] < 20 and 0 < entry["loss_last"] < 20
        assert 0 < entry["grad_norm"] < 1e3
    assert first["kernels"]["matrix product"] > 0
    assert sum(first["kernels"].values()) == pytest.approx(1.0)
    assert "aten::mm" in (out / "kernels.txt").read_text()

    summary = (out / "summary.txt").read_text()
    assert "facts: exit 0" in summary and "rows: exit 0" in summary
    for entry in good:
        assert f"| {entry['model']} | {entry['objective']} |" in summary
    assert "no_such_model masked" in summary
    assert len(list(out.iterdir())) <= 8


def test_without_a_gpu_it_says_what_can_be_done(root, tmp_path):
    if Path("/dev/nvidia0").exists():
        pytest.skip("there is a GPU here")
    result = run(root, tmp_path / "out", CPU="")
    assert result.returncode == 3 and "CPU=1" in result.stderr


def test_runs_that_share_a_gpu_are_valid_configurations(importable, tmp_path):
    from gpu_day import science

    from pretrain.config.compose import compose

    for device in ("cpu", "cuda"):
        arguments = Namespace(
            model="11m",
            unique_tokens=2_000_000,
            epochs=science.EPOCHS,
            device=device,
            pool=tmp_path / "pool",
        )
        for name, epochs in zip(science.RUNS, science.EPOCHS, strict=True):
            config = compose(science.overrides(name, arguments, tmp_path))
            assert config.objective.name == name and config.data.epochs == epochs
            assert config.run.path == tmp_path / name


@pytest.mark.slow
def test_evaluations_of_both_runs_are_kept(root, tmp_path, pool):
    out = tmp_path / "out"
    result = run(root, out, CPU="1", MODE="science", POOL=str(pool))
    assert result.returncode == 0, (out / "log.txt").read_text()[-3000:]
    found = json.loads((out / "science.json").read_text())
    for name in ("autoregressive", "masked"):
        last = found[name]["evaluations"][-1]
        assert 0 < last["validation/nats_per_token"] < 20
    assert last["train/epoch"] == 4


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        "train_step.py --bodies 10M --batch 2 --length 32 --repeats 1",
        "objective_step.py --layers 1 --hidden 64 --heads 2 --vocabulary 512 --batch 2 --length 32"
        " --repeats 1",
        "step_memory.py --layers 1 --hidden 64 --batch 2 --length 32 --rounds 1",
    ],
    ids=lambda command: command.split(".")[0],
)
def test_benchmarks_of_a_cpu_go_from_end_to_end(root, command):
    env = {**os.environ, "PYTHONPATH": str(root)}
    words = [sys.executable, *f"benchmarks/{command}".split()]
    result = subprocess.run(words, cwd=root, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
