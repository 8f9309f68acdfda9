"""Components from outside: the package of docs/examples, installed beside Epochal, used by name.

An objective, an optimizer, a sampler and a tracker, each one file and one YAML of a package that is
not ours; no file of ours knows them.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from installed import environment, small_run
from safetensors import safe_open

EXAMPLE = Path(__file__).resolve().parents[2] / "docs" / "examples" / "epochal-example"
WAY = """
import json, sys
from dataclasses import asdict
sys.path.insert(0, sys.argv[1])
from installed import command, train

kinds = {"train": train, "command": command}
calls = json.loads(sys.argv[2])
print("ANSWERS" + json.dumps({name: asdict(kinds[k](w)) for name, (k, *w) in calls.items()}))
"""
"""What the program answers, in one process: the imports of each call would take seconds."""


@pytest.fixture(scope="module")
def outside(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Environment in which the example is installed."""
    site = tmp_path_factory.mktemp("site")
    source = shutil.copytree(EXAMPLE, tmp_path_factory.mktemp("source") / "package")
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation"]
    command += ["--no-index", "--disable-pip-version-check", "--target", site, source]
    subprocess.run(command, check=True)
    path = os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH")]))
    return environment() | {"PYTHONPATH": path}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run with all that the example brings."""
    return tmp_path_factory.mktemp("outside") / "run"


@pytest.fixture(scope="module")
def answers(
    outside: dict[str, str], run: Path, pool: Path, finished: Path
) -> dict[str, dict[str, Any]]:
    """Exit code and output of each call."""
    small = small_run(pool)
    mine = [*small, "objective=backwards"]
    trained = [*mine, "optimizer=lion", "tracking=table", "optimizer.lr=0.003", "data.epochs=1"]
    confident = ["sampler=confident", "sampler.steps=5", "--num", "2"]
    calls = {
        "train": ["train", *trained, "train.log_interval=1", f"run.dir={run}"],
        "likelihood": ["command", "evaluate", str(run), "--draws", "2", "--json"],
        "samples": ["command", "sample", str(run), "--num", "2", "--prompt", "the end", "--json"],
        "confident": ["command", "sample", str(finished), *confident, "--json"],
        "plan": ["command", "plan", *mine, "optimizer=lion", "--machine", "h100x8", "--json"],
        "misspelt": ["command", "train", *small, "objective=backward"],
        "foreign": ["command", "train", *mine, "objective.loss=elbo"],
        "unfit": ["command", "train", *mine, "data.documents=masked"],
    }
    call = [sys.executable, "-c", WAY, str(Path(__file__).parent), json.dumps(calls)]
    done = subprocess.run(call, capture_output=True, text=True, check=False, env=outside)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.partition("ANSWERS")[2])


def test_an_objective_an_optimizer_a_sampler_and_a_tracker_from_another_package(answers, run: Path):
    """Trained, evaluated, sampled, tracked and planned by name."""
    for name in ("train", "likelihood", "samples", "confident", "plan"):
        assert answers[name]["returncode"] == 0, answers[name]["stdout"] + answers[name]["stderr"]
    likelihood = json.loads(answers["likelihood"]["stdout"])
    assert likelihood["objective"] == "backwards"
    assert likelihood["noise_error"] == 0  # it says that its likelihood is exact
    assert not likelihood["is_bound"]
    for sample in json.loads(answers["samples"]["stdout"]):
        assert sample["sampler"] == "backwards"
        assert sample["text"].endswith("the end")
    for sample in json.loads(answers["confident"]["stdout"]):
        assert sample["sampler"] == "confident"
        assert sample["network_evaluations"] == 5
        assert sample["settings"]["sampler"] == "confident"
    assert json.loads(answers["plan"]["stdout"])["model"]["flops_per_token"] > 0
    rows = list(csv.DictReader((run / "table.csv").open()))
    losses = [row for row in rows if row["name"] == "train/loss"]
    assert [int(row["step"]) for row in losses] == list(range(1, 26))
    assert float(losses[-1]["value"]) < float(losses[0]["value"])
    (states,) = run.glob("checkpoints/*/optimizer-*.safetensors")
    with safe_open(states, "pt") as file:
        assert {name.partition("/")[0] for name in file.keys()} == {"momentum"}  # noqa: SIM118


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("misspelt", "unknown objective 'backward'; did you mean backwards"),
        ("foreign", "objective backwards has no setting"),
        ("unfit", "needs data.documents=packed"),
    ],
)
def test_its_names_are_known_and_its_settings_checked_before_anything_starts(
    answers, name: str, message: str
):
    assert answers[name]["returncode"] == 2
    assert message in answers[name]["stderr"]
