"""Record of a study in its folder: the study as it was given, and facts about its runs.

`study.yaml` is the study, `study.json` the facts of every run. With both, `status` and `collect`
need the folder alone, and a changed study is noticed before anything starts.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from pretrain.config.run import Config
from pretrain.errors import ConfigError
from pretrain.study.runner.planned import Facts, Planned
from pretrain.study.runner.settings import FILE, Study
from pretrain.tracking.guard import restore

FACTS = "study.json"


@dataclass(frozen=True)
class Record:
    """Statements of a study's folder about it."""

    name: str
    runs: tuple[Facts, ...]
    tracking: dict[str, str] | None
    """Address of the MLflow server and name of the experiment; None where MLflow is off."""
    root: Path
    """Folder of the run folders."""


def write_record(folder: Path, study: Study, planned: list[Planned]) -> None:
    """Write the record, each file as a whole."""
    import yaml

    folder.mkdir(parents=True, exist_ok=True)
    plain = study.model_dump(mode="json", exclude_defaults=True)
    text = yaml.safe_dump(plain, sort_keys=False, width=100, allow_unicode=True)
    value = {
        "name": study.name,
        "tracking": _tracking(planned[0].config),
        "runs": [run.facts.to_dict() for run in planned],
    }
    for name, content in ((FILE, text), (FACTS, json.dumps(value, indent=1) + "\n")):
        if not (folder / name).exists() or (folder / name).read_text() != content:
            restore(folder / name, content.encode())


def read_record(folder: Path) -> Record:
    """Read the record; ConfigError where the folder has none or it is damaged."""
    path = folder / FACTS
    try:
        value = json.loads(path.read_text())
        runs = tuple(Facts(**facts) for facts in value["runs"])
        return Record(value["name"], runs, value["tracking"], folder / "runs")
    except FileNotFoundError:
        raise ConfigError(
            f"{folder} is not the folder of a study (no {FACTS}); `epochal study run FILE --dir "
            f"{folder}` begins one"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"cannot read {path} ({error}); `epochal study run` with --dry-run writes it again"
        ) from None


def removed_runs(folder: Path, planned: list[Planned]) -> list[str]:
    """Names of run folders that the study has no cell for any more."""
    known = {run.name for run in planned}
    found = (folder / "runs").glob("*/config.yaml")
    return sorted(path.parent.name for path in found if path.parent.name not in known)


def _tracking(config: Config) -> dict[str, str] | None:
    from pretrain.tracking.mlflow_store import tracking_uri

    if not config.tracking.mlflow:
        return None
    uri = tracking_uri(config.run.root, config.tracking.uri)
    return {"uri": uri, "experiment": config.tracking.experiment}
