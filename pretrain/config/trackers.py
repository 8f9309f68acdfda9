"""Settings of trackers: services that get a run's measurements, in addition to `metrics.jsonl`.

Free of torch. Adding one is described in docs/extending.md.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import PlainValidator, SerializeAsAny, field_validator

from pretrain.config.registry import Component, Registry
from pretrain.config.secrets import redacted
from pretrain.config.types import PositiveInt, Section

SCHEMES = (
    "http", "https", "sqlite", "postgresql", "mysql", "mssql", "databricks",
)  # fmt: skip
"""URL schemes of MLflow stores; a database may name its driver (`mysql+pymysql`)."""


class TrackerConfig(Component):
    """Settings of one tracker.

    Its implementation is called with (settings, config of the run, run folder, True where the run
    is resumed) and returns a `pretrain.tracking.queue.Client`.
    """


trackers: Registry[TrackerConfig] = Registry("tracker", TrackerConfig)
AnyTracker = Annotated[SerializeAsAny[TrackerConfig], PlainValidator(trackers.validate)]
"""Settings of one tracker, whose class follows from `name`."""


@trackers.register
class MlflowConfig(TrackerConfig):
    """An MLflow server, or one sqlite file for all runs below `run.root`."""

    name: Literal["mlflow"] = "mlflow"
    implementation: ClassVar[str] = "pretrain.tracking.mlflow:MlflowRun"

    uri: str | None = None
    """MLflow server; null takes the sqlite file of `run.root`."""
    experiment: str = "epochal"

    @field_validator("uri")
    @classmethod
    def _has_a_known_scheme(cls, uri: str | None) -> str | None:
        return checked_uri(uri)


def checked_uri(uri: str | None) -> str | None:
    """Check the address of an MLflow store; raises ValueError for an unknown scheme."""
    scheme, separator, _ = (uri or "").partition("://")
    # A saved configuration of an earlier version may name files; `file_store` refuses to start it.
    if separator and scheme.partition("+")[0] not in (*SCHEMES, "file"):
        allowed = ", ".join(f"{name}://..." for name in SCHEMES)
        raise ValueError(f"given {redacted(uri or '')!r}, allowed: {allowed}")
    return uri


def file_store(uri: str | None) -> bool:
    """True for MLflow's store of plain files, which loses measurements by now."""
    scheme, separator, _ = (uri or "").partition(":")
    plain_path = not separator and scheme not in ("", "databricks")
    return plain_path or scheme == "file"


def sqlite_uri(path: Path) -> str:
    """Address of a sqlite file; the characters of its path that addresses reserve are encoded."""
    text = str(path)
    for character in "%?#":  # % first
        text = text.replace(character, f"%{ord(character):02X}")
    return f"sqlite:///{text}"


class TrackingConfig(Section):
    """Services that get the measurements; `metrics.jsonl` in the run folder is always written."""

    mlflow: bool = True
    uri: str | None = None
    """MLflow server; null takes the sqlite file of `run.root`."""
    experiment: str = "epochal"
    group: str | None = None
    """Name of a study: its runs are nested below one MLflow run of that name."""
    trackers: tuple[AnyTracker, ...] = ()
    """Further services, each with its `name` and its settings."""
    queue_size: PositiveInt = 10000
    """Number of measurements kept while a service does not answer; older ones are read from
    `metrics.jsonl` later."""

    @field_validator("uri")
    @classmethod
    def _has_a_known_scheme(cls, uri: str | None) -> str | None:
        return checked_uri(uri)

    @field_validator("trackers")
    @classmethod
    def _are_different(cls, given: tuple[TrackerConfig, ...]) -> tuple[TrackerConfig, ...]:
        names = [tracker.name for tracker in given]
        if len({*names, "mlflow"}) <= len(names):
            raise ValueError(
                f"given {', '.join(names)}, allowed: every tracker once; MLflow is set up by "
                "tracking.mlflow, tracking.uri and tracking.experiment"
            )
        return given

    @property
    def services(self) -> tuple[TrackerConfig, ...]:
        """Settings of every tracker of the run."""
        ours = MlflowConfig(uri=self.uri, experiment=self.experiment)
        return (*((ours,) if self.mlflow else ()), *self.trackers)
