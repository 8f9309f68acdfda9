"""MLflow run of a whole study: the runs of its grid are nested below it, its table is stored there.

Several runs of a study begin at once. So the parent is looked for and made under a lock in the
folder that they share, which also holds its key: names of studies need not be unique on a server.
"""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock

from pretrain.tracking.guard import restore

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

    from pretrain.config.run import Config

PARENT_TAG = "mlflow.parentRunId"
GROUP_TAG = "epochal.study"
"""Tag of a parent and of its runs: the name of the study."""
_KEY_TAG = "epochal.study_key"
_KEY_FILE = "mlflow_study_id"
_LOCK_SECONDS = 60.0


def parent_tags(client: MlflowClient, experiment: str, config: Config) -> dict[str, str]:
    """Tags of a run that nest it below the run of its study; none outside a study."""
    group = config.tracking.group
    if group is None:
        return {}
    return {GROUP_TAG: group, PARENT_TAG: parent_run(client, experiment, group, config.run.root)}


def parent_run(client: MlflowClient, experiment: str, group: str, root: Path) -> str:
    """Id of the MLflow run of a study whose runs are below `root`; made where there is none."""
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / f".{_KEY_FILE}.lock", timeout=_LOCK_SECONDS):
        path = root / _KEY_FILE
        if not path.exists():
            restore(path, f"{uuid.uuid4().hex}\n".encode())
        key = path.read_text().strip()
        found = client.search_runs([experiment], filter_string=f"tags.`{_KEY_TAG}` = '{key}'")
        parents = [run for run in found if PARENT_TAG not in run.data.tags]
        if parents:
            return str(parents[0].info.run_id)
        tags = {_KEY_TAG: key, GROUP_TAG: group, "epochal.study_folder": str(root.parent)}
        run_id = str(client.create_run(experiment, run_name=group, tags=tags).info.run_id)
        client.set_terminated(run_id)  # it trains nothing; its runs have their states
        return run_id
