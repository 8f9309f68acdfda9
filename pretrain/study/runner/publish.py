"""A study in MLflow: evaluations of its runs are read, its table and figures are stored."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrain.errors import ConfigError
from pretrain.study.runner.record import Record, read_record
from pretrain.tracking.mlflow_store import sqlite_path
from pretrain.tracking.mlflow_study import PARENT_TAG, parent_run

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

_NAMES = (
    "validation/nats_per_token", "validation/noise_error", "validation/standard_error",
    "validation/bits_per_byte", "train/tokens", "train/flops",
)  # fmt: skip
"""Measurements of an evaluation; the first is the one that makes it one."""


def publish(folder: Path, paths: Iterable[Path], where: str = "") -> str | None:
    """Store files with the MLflow run of the study in `folder`.

    Returns None where they were stored or MLflow is off, else the reason why they were not.
    """
    try:
        record = read_record(folder)
        if record.tracking is None:
            return None
        client, experiment = _connect(record)
        run_id = parent_run(client, experiment, record.name, record.root)
        for path in paths:
            client.log_artifact(run_id, str(path), where or None)
    except Exception as error:  # a server may fail in any way; the files lie in the folder
        return f"{type(error).__name__}: {error}"
    return None


def evaluations(record: Record) -> dict[str, list[dict[str, float]]]:
    """Evaluations by name of the run, as `metrics.jsonl` has them; raises ConfigError."""
    if record.tracking is None:
        raise ConfigError(
            f"the study {record.name} has no MLflow (tracking.mlflow is false); collect it --from "
            "folders"
        )
    client, experiment = _connect(record)
    parent = parent_run(client, experiment, record.name, record.root)
    mine = f"tags.`{PARENT_TAG}` = '{parent}'"
    found: dict[str, list[dict[str, float]]] = {}
    for run in _all_runs(client, experiment, mine):
        found[str(run.info.run_name)] = _of_run(client, run.info.run_id)
    return found


def _connect(record: Record) -> tuple[MlflowClient, str]:
    """Client of the study's server, and the id of the experiment; raises ConfigError."""
    from mlflow.tracking import MlflowClient

    assert record.tracking is not None
    uri, name = record.tracking["uri"], record.tracking["experiment"]
    lacking = ConfigError(
        f"{uri} has no experiment {name!r}; collect --from folders, or send the runs with `epochal "
        "track sync`"
    )
    file = sqlite_path(uri)
    if file is not None and not file.exists():  # MLflow would make it
        raise lacking
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        raise lacking
    return client, str(experiment.experiment_id)


def _all_runs(client: MlflowClient, experiment: str, condition: str) -> list[Any]:
    """Runs that fulfil a condition, of every page of the answer."""
    runs: list[Any] = []
    page = None
    while True:
        answer = client.search_runs([experiment], filter_string=condition, page_token=page)
        runs += answer
        page = answer.token
        if not page:
            return runs


def _of_run(client: MlflowClient, run_id: str) -> list[dict[str, float]]:
    rows: dict[int, dict[str, float]] = defaultdict(dict)
    for name in _NAMES:
        for metric in client.get_metric_history(run_id, name):
            rows[metric.step] |= {"step": metric.step, name: metric.value}
    return [row for row in rows.values() if _NAMES[0] in row]
