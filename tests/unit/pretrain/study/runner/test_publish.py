"""A study in MLflow: runs nested below one run, the same table from there, files stored."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
import pytest

from cluster.status import write_status
from pretrain.config.compose import save_config
from pretrain.study.report.build import log_report, write_report
from pretrain.study.runner.collect import collect, write_table
from pretrain.study.runner.planned import Planned, plan_runs
from pretrain.study.runner.publish import publish
from pretrain.study.runner.record import write_record
from pretrain.study.runner.settings import Study
from pretrain.tracking import open_tracking

if TYPE_CHECKING:
    from mlflow.entities import Run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the study; making its store takes seconds."""
    return tmp_path_factory.mktemp("study's folder")


def measure(run: Planned) -> None:
    """What a run of three evaluations leaves, without training."""
    save_config(run.config, run.folder / "config.yaml")
    tracking = open_tracking(
        run.config, run.folder, rank=0, total_steps=9, resumed=False, start_step=0
    )
    for step in (3, 6, 9):
        counts = {"train/tokens": 100.0 * step, "train/flops": 1e9 * step / 7}
        tracking.log({"train/loss": 1.0 / step, **counts}, step)
        time.sleep(0.002)
        found = {"nats_per_token": 2 + run.facts.seed / step, "bits_per_byte": 1 / 3}
        found |= {"noise_error": 0.0} if run.facts.seed == 1 else {"standard_error": 0.1}
        tracking.log(counts | {f"validation/{k}": v for k, v in found.items()}, step)
    tracking.close("finished")
    write_status(run.folder, "finished", step=9, exit_code=0)


def all_runs(folder: Path) -> dict[str, Run]:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{folder / 'runs' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("s")
    assert experiment is not None
    found = client.search_runs([experiment.experiment_id])
    assert len({run.info.run_name for run in found}) == len(found)
    return {run.info.run_name: run for run in found}


def test_mlflow_has_the_table_of_a_study_and_its_files(
    small: Callable[..., Study], folder: Path
) -> None:
    words = ("data.unique_tokens=1000", "tracking.mlflow=true")
    study = small(base=words, grid={"run.seed": [1, 2]})
    runs = plan_runs(study, folder)
    write_record(folder, study, runs)
    for run in runs:
        measure(run)

    nested = all_runs(folder)
    parent = nested.pop("s")
    assert sorted(nested) == ["seed=1", "seed=2"]
    for run in nested.values():
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id

    table = collect(folder)
    assert len(table) == 6
    pd.testing.assert_frame_equal(collect(folder, "mlflow"), table)

    assert publish(folder, write_table(table, folder / "table")) is None
    stored = folder / "runs" / "mlartifacts" / parent.info.run_id / "artifacts" / "table.csv"
    assert stored.read_bytes() == (folder / "table.csv").read_bytes()
    report = write_report(folder, resamples=0)
    assert log_report(folder, report) is None
    assert (stored.parent / "report" / "index.html").read_bytes() == report.page.read_bytes()
    figures = {path.name for path in (stored.parent / "report" / "figures").iterdir()}
    assert figures == {path.name for path in report.figures} != set()
    assert len(all_runs(folder)) == 3  # the parent was found, not made again


def test_a_server_that_is_missing_is_a_reason_and_no_error(
    small: Callable[..., Study], tmp_path: Path
) -> None:
    missing = tmp_path / "missing" / "mlflow.db"
    words = ("data.unique_tokens=1000", "tracking.mlflow=true", f"tracking.uri=sqlite:///{missing}")
    study = small(base=words)
    write_record(tmp_path, study, plan_runs(study, tmp_path))
    (tmp_path / "table.csv").write_text("")
    reason = publish(tmp_path, [tmp_path / "table.csv"])
    assert reason is not None
    assert "has no experiment 's'" in reason
    assert not missing.parent.exists()


def test_without_mlflow_nothing_is_stored(small: Callable[..., Study], tmp_path: Path) -> None:
    study = small(base=("data.unique_tokens=1000",))
    write_record(tmp_path, study, plan_runs(study, tmp_path))
    assert publish(tmp_path, [tmp_path / "missing"]) is None
