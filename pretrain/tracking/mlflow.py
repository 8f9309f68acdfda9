"""Client of one MLflow run; its methods block and raise as MLflow does.

Only the worker thread of `pretrain.tracking.queue` calls it. Without a server all runs below one
`run.root` share a sqlite file and an artifact folder there, wherever the command is started from.

The MLflow run has each measurement of `metrics.jsonl` once. MLflow cannot delete a measurement. So
where a start repeats steps that the run already has, a new run with the same name, start and tags
takes its place, and the old one goes to MLflow's trash.
"""

from __future__ import annotations

import logging
import os
import time
import uuid
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrain.tracking import Status
from pretrain.tracking.guard import restore
from pretrain.tracking.mlflow_facts import EXPERIMENT_KIND, data_sets, log_model, source_tags
from pretrain.tracking.mlflow_names import to_mlflow
from pretrain.tracking.mlflow_store import (
    prepare_store,
    remove_stray_folder,
    sqlite_path,
    tracking_uri,
)
from pretrain.tracking.mlflow_study import parent_tags
from pretrain.tracking.points import Point, once, recorded_points

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

    from pretrain.config.run import Config
    from pretrain.config.trackers import MlflowConfig

_REQUEST_LIMITS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ASYNC_LOGGING": "false",
    "MLFLOW_LOGGING_LEVEL": "WARNING",  # else one line for every table of a new database
}
"""Environment variables of this process, unless the user has set them."""
_BATCH = 100
"""Parameters or tags in a request."""
_PARAM_LENGTH = 6000
_END_STATUS = {"finished": "FINISHED", "failed": "FAILED", "preempted": "KILLED"}
_FOLDER_TAG = "epochal.folder"
"""Tag of all MLflow runs that one run folder has begun; its value is in RUN/mlflow_folder_id."""
_REFUSED = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST")
"""Error codes with which MLflow would refuse the same request again."""

History = dict[tuple[str, int], list[int]]
"""Times in milliseconds of a run's measurements, by MLflow name and step."""


class DeletedError(Exception):
    """A run or an experiment is in MLflow's trash; the message has the remedy."""


class MlflowRun:
    """MLflow run of one run folder."""

    def __init__(
        self, settings: MlflowConfig, config: Config, run_dir: Path, resumed: bool
    ) -> None:
        self.address = tracking_uri(config.run.root, settings.uri)
        self._settings, self._config, self._run_dir = settings, config, run_dir
        self._id_file = run_dir / "mlflow_run_id"
        self._resumed = resumed
        self._begun_ms = round(time.time() * 1000)
        recorded = recorded_points(run_dir / "metrics.jsonl")
        self._begun_ms = min([self._begun_ms, *(p.time_ms for p in recorded[:1])])
        # Steps after this one are repeated; unknown where a resumed run has lost its record.
        self._last_step = max((p.step for p in recorded), default=None if resumed else -1)
        self._client: MlflowClient | None = None
        self._run_id = ""
        self._described = False

    def connect(self) -> None:
        """Import MLflow and start or continue the run, once."""
        if self._client is not None:
            return
        for name, value in _REQUEST_LIMITS.items():
            os.environ.setdefault(name, value)
        for talkative in ("mlflow", "alembic"):  # one line for every migration of the database
            logging.getLogger(talkative).setLevel(logging.WARNING)
        prepare_store(self.address)
        from mlflow.tracking import MlflowClient

        client = MlflowClient(self.address)
        self._run_id = self._continued_run(client) or self._new_run(client)
        remove_stray_folder(self.address)
        self._discard_others(client)
        self._client = client

    def lacking(self, recorded: Sequence[Point]) -> list[Point]:
        """Recorded measurements that the run lacks, all where a new run takes its place."""
        client = self._connected()
        history = self._history(client)
        if self._repeats(history, recorded):
            old = client.get_run(self._run_id)
            self._run_id = self._new_run(client, old)
            self._discard_others(client)
            history, self._described = {}, False
        if not self._described:
            self._describe(client)
            self._described = True
        return [p for p in once(recorded) if (to_mlflow(p.name), p.step) not in history]

    def log_points(self, points: list[Point]) -> None:
        """Send one request with up to 1,000 measurements."""
        from mlflow.entities import Metric

        metrics = [Metric(to_mlflow(p.name), p.value, p.time_ms, p.step) for p in points]
        client = self._connected()
        try:
            client.log_batch(self._run_id, metrics=metrics)
        except Exception as error:
            if getattr(error, "error_code", "") in _REFUSED:
                self._check_active(client.get_run(self._run_id), client)
            raise

    def log_params(self, values: Mapping[str, Any]) -> None:
        """Store parameters; one that changed on resume becomes a tag: parameters are write-once."""
        from mlflow.entities import Param, RunTag

        client = self._connected()
        text = {
            to_mlflow(k): "null" if v is None else str(v)[:_PARAM_LENGTH] for k, v in values.items()
        }
        known = client.get_run(self._run_id).data.params
        new = [Param(k, v) for k, v in text.items() if k not in known]
        changed = [
            RunTag(to_mlflow(f"changed.{k}"), v) for k, v in text.items() if known.get(k, v) != v
        ]
        for first in range(0, len(new), _BATCH):
            client.log_batch(self._run_id, params=new[first : first + _BATCH])
        for first in range(0, len(changed), _BATCH):
            client.log_batch(self._run_id, tags=changed[first : first + _BATCH])

    def log_artifact(self, path: Path, folder: str) -> None:
        """Copy a file into the run's artifacts."""
        self._connected().log_artifact(self._run_id, str(path), folder or None)

    def end(self, status: Status, time_ms: int) -> None:
        """Mark the run as ended at this time."""
        if self._client is not None:
            self._client.set_terminated(self._run_id, _END_STATUS[status], end_time=time_ms)

    def is_final(self, error: Exception) -> bool:
        """True for missing files and for requests that MLflow calls invalid."""
        missing = isinstance(error, (FileNotFoundError, IsADirectoryError, PermissionError))
        return missing or getattr(error, "error_code", "") in _REFUSED

    def _connected(self) -> MlflowClient:
        assert self._client is not None, "connect() comes first"
        return self._client

    def _history(self, client: MlflowClient) -> History:
        history: History = defaultdict(list)
        for name in client.get_run(self._run_id).data.metrics:
            for metric in client.get_metric_history(self._run_id, name):
                history[name, metric.step].append(metric.timestamp)
        return dict(history)

    def _repeats(self, history: History, recorded: Sequence[Point]) -> bool:
        """True where the run has a measurement of an attempt that the record has dropped."""
        times: History = defaultdict(list)
        for point in recorded:
            times[to_mlflow(point.name), point.step].append(point.time_ms)
        for (name, step), sent in history.items():
            known = times.get((name, step))
            if known is None:
                if self._last_step is not None and step > self._last_step:
                    return True
            elif any(min(abs(ms - k) for k in known) > 1 for ms in sent):  # 1 ms: rounding
                return True
        return False

    def _describe(self, client: MlflowClient) -> None:
        """Record settings, source, data sets and model."""
        from mlflow.entities import RunTag
        from mlflow.exceptions import MlflowException

        from pretrain.config.compose import flatten

        self.log_params(flatten(self._config))
        if (saved := self._run_dir / "config.yaml").exists():
            self.log_artifact(saved, "")
        tags = [RunTag(k, v) for k, v in source_tags(self._config).items()]
        client.log_batch(self._run_id, tags=tags)
        with suppress(MlflowException):  # a server of an earlier version
            client.log_inputs(self._run_id, data_sets(self._config))
            log_model(client, self._run_id, self._config)

    def _continued_run(self, client: MlflowClient) -> str | None:
        """Run of an earlier start, or None: there is none, or this start begins anew."""
        run = self._noted_run(client)
        if run is None:
            return None
        if not self._resumed:
            if run.info.status == "FINISHED":  # not an interrupted start of the same training
                self._folder_id(renew=True)
            return None
        self._check_active(run, client)
        run_id = str(run.info.run_id)
        client.update_run(run_id, status="RUNNING")
        client.set_tag(run_id, _FOLDER_TAG, self._folder_id())
        restore(self._id_file, f"{run_id}\n".encode())
        return run_id

    def _noted_run(self, client: MlflowClient) -> Run | None:
        """Run whose id is noted; where another server has that one, this server's newest."""
        from mlflow.exceptions import MlflowException

        try:
            return client.get_run(self._id_file.read_text().strip())
        except FileNotFoundError:
            return None
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
        experiment = client.get_experiment_by_name(self._settings.experiment)
        found = self._of_this_folder(client, experiment.experiment_id) if experiment else []
        return found[0] if found else None

    def _of_this_folder(self, client: MlflowClient, experiment: str) -> list[Run]:
        mine = f"tags.`{_FOLDER_TAG}` = '{self._folder_id()}'"
        return list(client.search_runs([experiment], filter_string=mine))

    def _check_active(self, run: Run, client: MlflowClient) -> None:
        """Raise DeletedError where the run is in MLflow's trash."""
        if run.info.lifecycle_stage != "deleted":
            return
        where = f"MLFLOW_TRACKING_URI='{self.address}' mlflow"
        number = run.info.experiment_id
        if client.get_experiment(number).lifecycle_stage == "deleted":
            raise DeletedError(
                f"the experiment of this run is deleted; restore it with `{where} experiments "
                f"restore --experiment-id {number}`"
            )
        raise DeletedError(
            f"MLflow run {run.info.run_id} is deleted; restore it with `{where} runs restore "
            f"--run-id {run.info.run_id}`, or remove {self._id_file} to begin another"
        )

    def _experiment(self, client: MlflowClient) -> str:
        name = self._settings.experiment
        experiment = client.get_experiment_by_name(name)
        if experiment is None:
            # Without a server MLflow would put artifacts below the current folder.
            file = sqlite_path(self.address)
            uri = (file.absolute().parent / "mlartifacts").as_uri() if file else None
            number = client.create_experiment(name, uri, tags=dict([EXPERIMENT_KIND]))
            return str(number)
        if experiment.lifecycle_stage == "deleted":
            raise DeletedError(
                f"the experiment {name!r} is deleted; restore it with `MLFLOW_TRACKING_URI="
                f"'{self.address}' mlflow experiments restore --experiment-id "
                f"{experiment.experiment_id}`, or choose another tracking.experiment"
            )
        if EXPERIMENT_KIND[0] not in experiment.tags:
            client.set_experiment_tag(experiment.experiment_id, *EXPERIMENT_KIND)
        return str(experiment.experiment_id)

    def _new_run(self, client: MlflowClient, old: Run | None = None) -> str:
        """Begin a run; it takes over name, start and tags of an old one."""
        experiment = self._experiment(client) if old is None else old.info.experiment_id
        tags = parent_tags(client, experiment, self._config) if old is None else dict(old.data.tags)
        tags |= {"run_dir": str(self._run_dir), _FOLDER_TAG: self._folder_id()}
        run = client.create_run(
            experiment,
            start_time=self._begun_ms if old is None else old.info.start_time,
            run_name=self._config.run.name if old is None else old.info.run_name,
            tags=tags,
        )
        restore(self._id_file, f"{run.info.run_id}\n".encode())
        return str(run.info.run_id)

    def _discard_others(self, client: MlflowClient) -> None:
        """Move to the trash what this folder's other starts began, killed ones included."""
        experiment = client.get_run(self._run_id).info.experiment_id
        for run in self._of_this_folder(client, experiment):
            if run.info.run_id != self._run_id:
                client.set_tag(run.info.run_id, "epochal.replaced_by", self._run_id)
                client.delete_run(run.info.run_id)

    def _folder_id(self, *, renew: bool = False) -> str:
        path = self._run_dir / "mlflow_folder_id"
        if renew or not path.exists():
            restore(path, f"{uuid.uuid4().hex}\n".encode())
        return path.read_text().strip()
