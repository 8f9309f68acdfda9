"""`epochal track sync`: send to a run's services what they lack of its `metrics.jsonl`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cluster.folder import exclusive
from cluster.status import read_status
from pretrain.config.compose import load_config, replace_values
from pretrain.errors import ConfigError, EpochalError
from pretrain.tracking import Status
from pretrain.tracking.points import recorded_points
from pretrain.tracking.queue import BATCH


class TrackingError(EpochalError):
    """A service of a run that does not take its measurements."""

    exit_code = 1


def sync_run(run: Path, uri: str | None = None) -> list[dict[str, Any]]:
    """Send the missing measurements of a run that is not training; `uri` is another MLflow server.

    Returns service, address and numbers of recorded and sent measurements of each service. Raises
    ConfigError for a folder without a run, FolderInUseError, TrackingError where a service fails.
    """
    saved, record = run / "config.yaml", run / "metrics.jsonl"
    if not saved.exists():
        raise ConfigError(f"{run} has no config.yaml; give the folder of a run")
    config = load_config(saved)
    if uri is not None:
        config = replace_values(config, {"tracking.uri": uri, "tracking.mlflow": True})
    with exclusive(run):
        points = recorded_points(record)
        sent = []
        for settings in config.tracking.services:
            client = settings.load()(settings, config, run, True)
            try:
                client.connect()
                lacking = client.lacking(points)
                for first in range(0, len(lacking), BATCH):
                    client.log_points(lacking[first : first + BATCH])
                if points:
                    client.end(_status(run), points[-1].time_ms)
            except Exception as error:  # whatever a service raises
                raise TrackingError(
                    f"{settings.name} at {client.address}: {error}; what has arrived is not sent "
                    "again by the next try"
                ) from error
            about = {"service": settings.name, "address": client.address}
            sent.append({**about, "recorded": len(points), "sent": len(lacking)})
        return sent


def _status(run: Path) -> Status:
    stated = read_status(run)
    if stated is None or stated["state"] == "running":
        return "failed"  # the process was killed
    state: Status = stated["state"]
    return state
