"""Client of one MLflow run; its methods block and raise as MLflow does.

Only the worker thread of `pretrain.tracking.queue` calls it. Without a server all runs below one
`run.root` share a sqlite file and an artifact folder there, wherever the command is started from.
"""

from __future__ import annotations

import logging
import os
import sqlite3
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrain.tracking import Status
from pretrain.tracking.queue import Point

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

    from pretrain.config.run import Config
    from pretrain.config.trackers import MlflowConfig

_REQUEST_LIMITS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ASYNC_LOGGING": "false",
}
"""Environment variables of this process, unless the user has set them."""
_PARAMS_BATCH = 100
_PARAM_LENGTH = 6000
_END_STATUS = {"finished": "FINISHED", "failed": "FAILED", "preempted": "KILLED"}

_REFUSED = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST")
"""Error codes with which MLflow would refuse the same request again."""


class MlflowRun:
    """MLflow run of one run folder."""

    def __init__(
        self, settings: MlflowConfig, config: Config, run_dir: Path, resumed: bool
    ) -> None:
        self.address = tracking_uri(config, settings.uri)
        self._settings = settings
        self._config = config
        self._run_dir = run_dir
        self._id_file = run_dir / "mlflow_run_id"
        self._continue = resumed
        self._client: MlflowClient | None = None
        self._run_id = ""
        self._continued = False

    def connect(self) -> bool:
        """Import MLflow and start or continue the run, once; return True where it is continued."""
        if self._client is not None:
            return self._continued
        for name, value in _REQUEST_LIMITS.items():
            os.environ.setdefault(name, value)
        if self._settings.uri is None:
            _probe_sqlite(self._config.run.root / "mlflow.db")
        from mlflow.tracking import MlflowClient

        for talkative in ("mlflow", "alembic"):  # one line for every migration of the database
            logging.getLogger(talkative).setLevel(logging.WARNING)
        client = MlflowClient(self.address)
        earlier = self._earlier_run(client)
        self._continued = earlier is not None
        self._run_id = earlier or self._new_run(client)
        self._client = client
        self._log_config()
        return self._continued

    def log_points(self, points: list[Point]) -> None:
        """Send one request with up to 1,000 measurements."""
        from mlflow.entities import Metric

        self._connected().log_batch(self._run_id, metrics=[Metric(*point) for point in points])

    def log_params(self, values: Mapping[str, Any]) -> None:
        """Store parameters; one that changed on resume becomes a tag: parameters are write-once."""
        from mlflow.entities import Param, RunTag

        client = self._connected()
        text = {k: "null" if v is None else str(v)[:_PARAM_LENGTH] for k, v in values.items()}
        known = client.get_run(self._run_id).data.params
        new = [Param(k, v) for k, v in text.items() if k not in known]
        changed = [RunTag(f"changed.{k}", v) for k, v in text.items() if known.get(k, v) != v]
        for first in range(0, len(new), _PARAMS_BATCH):
            client.log_batch(self._run_id, params=new[first : first + _PARAMS_BATCH])
        if changed:
            client.log_batch(self._run_id, tags=changed)

    def log_artifact(self, path: Path, folder: str) -> None:
        """Copy a file into the run's artifacts."""
        self._connected().log_artifact(self._run_id, str(path), folder or None)

    def end(self, status: Status) -> None:
        """Mark the run as ended."""
        if self._client is not None:
            self._client.set_terminated(self._run_id, _END_STATUS[status])

    def is_final(self, error: Exception) -> bool:
        """True for missing files and for requests that MLflow calls invalid."""
        missing = isinstance(error, (FileNotFoundError, IsADirectoryError, PermissionError))
        return missing or getattr(error, "error_code", "") in _REFUSED

    def _connected(self) -> MlflowClient:
        assert self._client is not None, "connect() comes first"
        return self._client

    def _log_config(self) -> None:
        from pretrain.config.compose import flatten

        self.log_params(flatten(self._config))
        saved = self._run_dir / "config.yaml"
        if saved.exists():
            self.log_artifact(saved, "")

    def _earlier_run(self, client: MlflowClient) -> str | None:
        from mlflow.exceptions import MlflowException

        if not self._continue or not self._id_file.exists():
            return None
        run_id = self._id_file.read_text().strip()
        try:
            client.update_run(run_id, status="RUNNING")
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":  # another server: start a new run
                return None
            raise
        return run_id

    def _new_run(self, client: MlflowClient) -> str:
        name = self._settings.experiment
        experiment = client.get_experiment_by_name(name)
        if experiment is not None:
            experiment_id = experiment.experiment_id
        else:
            # Without a server MLflow would put artifacts below the current folder.
            place = None if self._settings.uri else self._config.run.root / "mlartifacts"
            experiment_id = client.create_experiment(name, place.as_uri() if place else None)
        run = client.create_run(
            experiment_id, run_name=self._config.run.name, tags={"run_dir": str(self._run_dir)}
        )
        self._id_file.write_text(run.info.run_id + "\n")
        return str(run.info.run_id)


def _probe_sqlite(path: Path) -> None:
    """Raise at once where the file cannot be opened or read; MLflow would retry for minutes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with closing(sqlite3.connect(path, timeout=2.0)) as database:
        database.execute("SELECT count(*) FROM sqlite_master").fetchone()


def tracking_uri(config: Config, uri: str | None) -> str:
    """Address of the store: `uri`, or the sqlite file that all runs below `run.root` share."""
    return uri or f"sqlite:///{config.run.root.absolute() / 'mlflow.db'}"
