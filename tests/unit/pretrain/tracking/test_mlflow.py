"""The MLflow run of a run folder: every recorded measurement once, whatever was interrupted."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pretrain.config.compose import compose, save_config
from pretrain.config.run import Config
from pretrain.config.trackers import sqlite_uri
from pretrain.errors import ConfigError
from pretrain.tracking import Tracking, open_tracking
from pretrain.tracking.mlflow_names import to_mlflow
from pretrain.tracking.mlflow_store import prepare_store, sqlite_path, tracking_uri
from pretrain.tracking.points import once, recorded_points
from pretrain.tracking.queue import QueuedSink
from pretrain.tracking.sync import sync_run

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

MIX_NAME = "web:en|c++"


def from_mlflow(name: str) -> str:
    """Name before the mapping."""
    return re.sub(r"-x([0-9A-F]+)-", lambda found: chr(int(found[1], 16)), name)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of runs with one store; its path has the characters that addresses reserve."""
    return tmp_path_factory.mktemp("50%?of#it")


@pytest.fixture
def config(root: Path, pool: Path, request: pytest.FixtureRequest) -> Config:
    """A run in that folder, and an experiment for each test."""
    name = request.node.name.translate({ord("["): "-", ord("]"): None})
    overrides = [
        "model=tiny",
        f"data.train={pool / 'train' / 'manifest.json'}",
        f"data.validation={pool / 'validation' / 'manifest.json'}",
        f"data.tokenizer={pool / 'tokenizer.model'}",
        f"run.name={name}",
        f"tracking.experiment={name}",
    ]
    composed = compose(overrides)
    config = composed.model_copy(update={"run": composed.run.model_copy(update={"root": root})})
    save_config(config, config.run.path / "config.yaml")
    return config


def begin(config: Config, start_step: int | None = None) -> Tracking:
    return open_tracking(
        config,
        config.run.path,
        rank=0,
        total_steps=100,
        resumed=start_step is not None,
        start_step=start_step or 0,
    )


def attempt(config: Config, start: int | None, steps: range) -> None:
    """Measurements of one start, all sent."""
    tracking = begin(config, start)
    for step in steps:
        tracking.log({"train/loss": 1 / (step + 1), "train/epoch": step / 10}, step)
        if step % 5 == 0:
            tracking.log({"validation/nll": 2.0, "train/epoch": step / 10}, step)
    tracking.close("finished")


def store(config: Config) -> MlflowClient:
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri(config.run.root, None))


def active_runs(config: Config) -> list[Run]:
    client = store(config)
    experiment = client.get_experiment_by_name(config.tracking.experiment)
    assert experiment is not None
    return list(client.search_runs([experiment.experiment_id]))


def assert_recorded_once(config: Config) -> Run:
    """One active run, whose points are those of metrics.jsonl, times included."""
    (run,) = active_runs(config)
    client = store(config)
    sent = [
        (from_mlflow(m.key), m.value, m.timestamp, m.step)
        for name in run.data.metrics
        for m in client.get_metric_history(run.info.run_id, name)
    ]
    recorded = once(recorded_points(config.run.path / "metrics.jsonl"))
    assert sorted(sent) == sorted(tuple(p) for p in recorded)
    return run


def test_steps_that_a_resume_repeats_are_there_once_and_from_the_last_attempt(
    config: Config,
) -> None:
    attempt(config, None, range(1, 16))
    first = assert_recorded_once(config)
    store(config).set_tag(first.info.run_id, "mine", "kept")
    attempt(config, 10, range(11, 21))
    second = assert_recorded_once(config)
    assert second.info.run_id != first.info.run_id
    assert second.info.start_time == first.info.start_time
    assert second.data.tags["mine"] == "kept"
    old = store(config).get_run(first.info.run_id)
    assert old.info.lifecycle_stage == "deleted"
    assert old.data.tags["epochal.replaced_by"] == second.info.run_id
    attempt(config, 20, range(21, 26))  # nothing is repeated
    assert assert_recorded_once(config).info.run_id == second.info.run_id


def test_a_start_from_nothing_replaces_an_interrupted_one_and_keeps_a_finished_one(
    config: Config,
) -> None:
    tracking = begin(config)
    tracking.log({"loss": 1.0}, 1)
    tracking.close("failed")
    attempt(config, None, range(3))
    finished = assert_recorded_once(config)
    attempt(config, None, range(2))
    assert finished.info.run_id in {run.info.run_id for run in active_runs(config)}


def test_a_run_that_a_killed_start_began_is_not_left_over(config: Config) -> None:
    """Killed between the creation of the run and the note of its id."""
    attempt(config, None, range(3))
    client, (run,) = store(config), active_runs(config)
    tag = {"epochal.folder": run.data.tags["epochal.folder"]}
    client.create_run(run.info.experiment_id, tags=tag)
    attempt(config, 2, range(3, 5))
    assert assert_recorded_once(config).info.run_id == run.info.run_id


def test_sync_by_hand_sends_what_is_missing_once(config: Config, tmp_path: Path) -> None:
    attempt(config, None, range(3))
    record = config.run.path / "metrics.jsonl"
    with record.open("a") as file:
        file.writelines(
            json.dumps({"step": s, "time": 2e9 + s, "train/loss": 0.5}) + "\n" for s in (3, 4)
        )
    (done,) = sync_run(config.run.path)
    assert (done["recorded"], done["sent"]) == (10, 2)
    run = assert_recorded_once(config)
    assert run.info.end_time == 2_000_000_004_000
    (again,) = sync_run(config.run.path)
    assert again["sent"] == 0
    (elsewhere,) = sync_run(config.run.path, sqlite_uri(tmp_path / "other.db"))
    assert elsewhere["sent"] == 9  # train/epoch is in a report and in its evaluation
    assert list((tmp_path / "mlartifacts").rglob("config.yaml"))
    assert not Path("mlruns").exists()
    (back,) = sync_run(config.run.path)
    assert back["sent"] == 0
    assert assert_recorded_once(config).info.run_id == run.info.run_id
    with pytest.raises(ConfigError, match=r"no config\.yaml"):
        sync_run(tmp_path)


def test_a_branch_names_the_run_that_it_started_from(config: Config) -> None:
    """By a tag with the MLflow run of its origin, which it keeps when the origin is gone."""
    trunk = config.run.path.with_name("trunk")
    branch = {"branch_from": trunk / "checkpoints" / "step-00000008", "branch_sha256": "0" * 64}
    config = config.model_copy(update={"run": config.run.model_copy(update=branch)})
    attempt(config, None, range(2))
    assert "epochal.branch_of" not in assert_recorded_once(config).data.tags
    trunk.mkdir()
    (trunk / "mlflow_run_id").write_text("abc\n")
    attempt(config, 1, range(2, 4))
    shutil.rmtree(trunk)
    attempt(config, 3, range(4, 6))
    run = assert_recorded_once(config)
    assert run.data.tags["epochal.branch_of"] == "abc"
    assert run.data.params["run.branch_from"] == str(branch["branch_from"])
    assert run.data.params["run.branch_sha256"] == "0" * 64


def test_source_data_and_model_are_recorded_and_the_experiment_shows_training(
    config: Config,
) -> None:
    before = round(time.time() * 1000)
    attempt(config, None, range(2))
    attempt(config, 1, range(2, 4))
    run = assert_recorded_once(config)
    assert before <= run.info.start_time <= run.info.end_time <= time.time() * 1000
    tags = run.data.tags
    assert tags["mlflow.source.name"]
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False,
        cwd=Path(__file__).parent,
    ).stdout.strip()  # fmt: skip
    assert tags.get("mlflow.source.git.commit", "") == commit
    contexts = [
        (d.tags[0].value, Path(json.loads(d.dataset.source)["uri"]).parent.name)
        for d in run.inputs.dataset_inputs
    ]
    assert sorted(contexts) == [("training", "train"), ("validation", "validation")]
    (output,) = run.outputs.model_outputs
    model = store(config).get_logged_model(output.model_id)
    assert model.params["model.num_layers"] == str(config.model.num_layers)
    assert model.tags["epochal.checkpoints"].endswith("checkpoints")
    experiment = store(config).get_experiment(run.info.experiment_id)
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"


def test_names_that_mlflow_refuses_are_mapped(config: Config) -> None:
    names = [MIX_NAME, "日本", "a//b", "../x", "100 %", "a-x7C-b", "a|b"]
    tracking = begin(config)
    tracking.params({f"mixture/{name}/share": 0.5 for name in names})
    tracking.log(dict.fromkeys(names, 1.0), 1)
    tracking.close("finished")
    run = assert_recorded_once(config)
    assert {from_mlflow(k) for k in run.data.params} >= {f"mixture/{n}/share" for n in names}


@pytest.mark.parametrize(
    "name", [MIX_NAME, "日本", "a//b", "..", "/a", "-x7C-", "--x7C-|", "é:ü %"]
)
def test_the_mapping_of_names_can_be_undone(name: str) -> None:
    from mlflow.utils.validation import _validate_metric_name

    _validate_metric_name(to_mlflow(name))
    assert from_mlflow(to_mlflow(name)) == name
    _validate_metric_name(to_mlflow(name * 300))
    assert len(to_mlflow(name * 300)) <= 250


def test_ordinary_names_stay() -> None:
    for name in ("train/loss", "optimizer.betas", "validation/bits per byte", "a-xyz"):
        assert to_mlflow(name) == name


@pytest.mark.parametrize("deleted", ["run", "experiment"])
def test_a_deleted_run_or_experiment_gets_its_remedy(
    config: Config, deleted: str, capsys: pytest.CaptureFixture[str]
) -> None:
    attempt(config, None, range(2))
    client, (run,) = store(config), active_runs(config)
    if deleted == "run":
        client.delete_run(run.info.run_id)
        remedy = f"mlflow runs restore --run-id {run.info.run_id}"
    else:
        client.delete_experiment(run.info.experiment_id)
        remedy = f"mlflow experiments restore --experiment-id {run.info.experiment_id}"
    tracking = begin(config, 1)
    tracking.log({"train/loss": 0.1, "train/epoch": 0.2}, 2)
    sink = tracking._sinks["mlflow"]
    assert isinstance(sink, QueuedSink)
    end = time.monotonic() + 60
    while not sink._failing and time.monotonic() < end:
        time.sleep(0.05)
    assert remedy in " ".join(capsys.readouterr().out.split())
    if deleted == "run":
        client.restore_run(run.info.run_id)
    else:
        client.restore_experiment(run.info.experiment_id)
    tracking.close("finished")
    assert assert_recorded_once(config).info.run_id == run.info.run_id


def test_a_path_with_reserved_characters_has_one_store_and_no_stray_folder(
    config: Config, root: Path
) -> None:
    attempt(config, None, range(2))
    assert_recorded_once(config)
    assert sqlite_path(tracking_uri(root, None)) == root / "mlflow.db"
    assert (root / "mlflow.db").is_file()
    assert not [p for p in root.parent.iterdir() if "%25" in p.name]
    (run,) = active_runs(config)
    (saved,) = (root / "mlartifacts" / run.info.run_id).rglob("config.yaml")
    assert saved.read_bytes() == (config.run.path / "config.yaml").read_bytes()


MAKE = "import sys; from pretrain.tracking.mlflow_store import prepare_store as p; p(sys.argv[1])"


def whole(path: Path) -> bool:
    from pretrain.tracking.mlflow_store import _is_whole

    return _is_whole(path)


def test_a_store_whose_first_migration_was_killed_or_raced_is_made_whole(tmp_path: Path) -> None:
    path = tmp_path / "mlflow.db"
    command = [sys.executable, "-c", MAKE, sqlite_uri(path)]
    killed = subprocess.Popen(command)
    while not list(tmp_path.glob(".mlflow.db.*/mlflow.db")):
        assert killed.poll() is None
        time.sleep(0.005)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    assert not path.exists()  # nothing half-made under its name
    racing = [subprocess.Popen(command) for _ in range(2)]
    assert [process.wait(timeout=120) for process in racing] == [0, 0]
    assert whole(path)
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != "mlflow.db.lock") == ["mlflow.db"]


def test_a_half_made_store_of_an_earlier_version_is_set_aside(tmp_path: Path) -> None:
    path = tmp_path / "mlflow.db"
    half = sqlite3.connect(path)
    half.executescript("CREATE TABLE experiments (id); CREATE TABLE alembic_version (version_num);")
    half.close()
    prepare_store(sqlite_uri(path))
    assert whole(path)
    assert (tmp_path / "mlflow.db.unusable-1").exists()
    kept = path.read_bytes()
    prepare_store(sqlite_uri(path))
    assert path.read_bytes() == kept
