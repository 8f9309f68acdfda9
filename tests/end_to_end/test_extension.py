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

import pytest
from installed import environment, small_run
from safetensors import safe_open

EXAMPLE = Path(__file__).resolve().parents[2] / "docs" / "examples" / "epochal-example"
WAY = """
import json, sys
from typer.testing import CliRunner
from pretrain.cli.main import app
from pretrain.train import main

train, run, masked = json.loads(sys.argv[1])
assert main(train) == 0
answers = {}
for name, *command in (
    ("likelihood", "evaluate", run, "--draws", "2", "--json"),
    ("samples", "sample", run, "--num", "2", "--prompt", "the end", "--json"),
    ("confident", "sample", masked, "sampler=confident", "sampler.steps=5", "--num", "2", "--json"),
):
    done = CliRunner().invoke(app, command, catch_exceptions=False)
    answers[name] = json.loads(done.stdout)
print("ANSWERS" + json.dumps(answers))
"""


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


def test_an_objective_an_optimizer_a_sampler_and_a_tracker_from_another_package(
    outside: dict[str, str], pool: Path, finished: Path, tmp_path: Path
):
    """Trained, evaluated, sampled, tracked and planned by name."""
    run = tmp_path / "run"
    train = [*small_run(pool), "objective=backwards", "optimizer=lion", "tracking=table"]
    train += ["optimizer.lr=0.003"]
    train += ["data.epochs=1", "train.log_interval=1", f"run.dir={run}"]
    call = [sys.executable, "-c", WAY, json.dumps([train, str(run), str(finished)])]
    done = subprocess.run(call, capture_output=True, text=True, check=False, env=outside)
    assert done.returncode == 0, done.stdout + done.stderr
    answers = json.loads(done.stdout.partition("ANSWERS")[2])

    likelihood = answers["likelihood"]
    assert likelihood["objective"] == "backwards"
    assert likelihood["noise_error"] == 0  # it says that its likelihood is exact
    assert not likelihood["is_bound"]
    for sample in answers["samples"]:
        assert sample["sampler"] == "backwards"
        assert sample["text"].endswith("the end")
    for sample in answers["confident"]:
        assert sample["sampler"] == "confident"
        assert sample["network_evaluations"] == 5
        assert sample["settings"]["sampler"] == "confident"
    rows = list(csv.DictReader((run / "table.csv").open()))
    losses = [row for row in rows if row["name"] == "train/loss"]
    assert [int(row["step"]) for row in losses] == list(range(1, 26))
    assert float(losses[-1]["value"]) < float(losses[0]["value"])
    (states,) = run.glob("checkpoints/*/optimizer-*.safetensors")
    with safe_open(states, "pt") as file:
        assert {name.partition("/")[0] for name in file.keys()} == {"momentum"}  # noqa: SIM118


def test_its_names_are_known_and_its_settings_checked_before_anything_starts(
    outside: dict[str, str], pool: Path
):
    """`plan` reads it; a misspelt name, a foreign key and its own check are refused in a line."""

    def epochal(*words: str) -> subprocess.CompletedProcess[str]:
        code = "from pretrain.cli.main import main; main()"
        command = [sys.executable, "-c", code, *words]
        return subprocess.run(command, capture_output=True, text=True, check=False, env=outside)

    words = [*small_run(pool), "objective=backwards", "optimizer=lion", "--machine", "h100x8"]
    planned = epochal("plan", *words, "--json")
    assert planned.returncode == 0, planned.stderr
    assert "backwards" in planned.stdout
    for words, message in (
        (["objective=backward"], "unknown objective 'backward'; did you mean backwards"),
        (["objective=backwards", "objective.loss=elbo"], "objective backwards has no setting"),
        (["objective=backwards", "data.documents=masked"], "needs data.documents=packed"),
    ):
        refused = epochal("train", *small_run(pool), *words)
        assert refused.returncode == 2
        assert message in refused.stderr
