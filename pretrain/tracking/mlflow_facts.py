"""Facts of a run for MLflow: what started it, the commit of its code, its data sets, its model."""

from __future__ import annotations

import getpass
import json
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from data_pipeline.errors import DataError

if TYPE_CHECKING:
    from mlflow.entities import DatasetInput
    from mlflow.tracking import MlflowClient

    from pretrain.config.run import Config

EXPERIMENT_KIND = ("mlflow.experimentKind", "custom_model_development")
"""Tag by which MLflow's pages show an experiment as training runs instead of generative AI."""
_DIGEST_LENGTH = 36
_NAME_LENGTH = 500


def source_tags(config: Config) -> dict[str, str]:
    """Tags that name the program, the user, in a checkout the commit, and the origin of a branch.

    The origin is the MLflow run of the run folder that a branch started from, if that is still
    there.
    """
    from pretrain import __version__

    tags = {
        "mlflow.source.name": Path(sys.argv[0]).name or "epochal",
        "mlflow.source.type": "LOCAL",
        "epochal.version": __version__,
    }
    with suppress(Exception):  # no entry in the password file
        tags["mlflow.user"] = getpass.getuser()
    commit = git_commit(Path(__file__).parent)
    if commit is not None:
        tags["mlflow.source.git.commit"] = commit
    if config.run.branch_from is not None:
        with suppress(OSError):
            noted = config.run.branch_from.parent.parent / "mlflow_run_id"
            tags["epochal.branch_of"] = noted.read_text().strip()
    return tags


def git_commit(folder: Path) -> str | None:
    """Commit of the checkout that a folder is in, or None."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), "rev-parse", "HEAD"],
            capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def data_sets(config: Config) -> list[DatasetInput]:
    """Pools of the run; those that cannot be read any more are left out."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    from data_pipeline.stream.open_stream import read_pools

    d, found = config.data, []
    for context, location, budget in (
        ("training", d.train, d.unique_tokens),
        ("validation", d.validation, None),
    ):
        try:
            pools = read_pools(location, budget, d.order)
        except DataError:
            continue
        for pool in pools:
            about = {"tokens": pool.manifest.tokens, "unique_tokens": pool.unique_tokens}
            dataset = Dataset(
                name=str(pool.location)[-_NAME_LENGTH:],
                digest=pool.manifest.sha256[:_DIGEST_LENGTH],
                source_type="manifest",
                source=json.dumps({"uri": str(pool.location)}),
                profile=json.dumps(about),
            )
            found.append(DatasetInput(dataset, [InputTag("mlflow.data.context", context)]))
    return found


def log_model(client: MlflowClient, run_id: str, config: Config) -> None:
    """Record the model of a run, once; its weights stay in the checkpoints."""
    from mlflow.entities import LoggedModelOutput, LoggedModelStatus

    run = client.get_run(run_id)
    if run.outputs is not None and run.outputs.model_outputs:
        return
    name = "".join("-" if c in "/:.%\"'" else c for c in config.run.name) or "model"
    model = client.create_logged_model(
        run.info.experiment_id,
        name=name,
        source_run_id=run_id,
        model_type=config.objective.name,
        params={f"model.{k}": str(v) for k, v in config.model.model_dump(mode="json").items()},
        tags={
            "mlflow.model.isExternal": "true",
            "epochal.checkpoints": str(config.run.path.absolute() / "checkpoints"),
        },
    )
    client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step=0)])
    client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)
