"""Settings of trackers: services that a run's measurements are sent to, beside `metrics.jsonl`.

Free of torch. Adding one is described in docs/extending.md.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import PlainValidator, SerializeAsAny, field_validator

from pretrain.config.registry import Component, Registry

SCHEMES = (
    "http", "https", "file", "sqlite", "postgresql", "mysql", "mssql", "databricks",
)  # fmt: skip
"""Kinds of MLflow stores; a database may name its driver (`mysql+pymysql`)."""


class TrackerConfig(Component):
    """Settings of one tracker. Its implementation is called with (settings, config of the run, run
    folder, True where the run goes on) and returns a `pretrain.tracking.queue.Client`."""


trackers: Registry[TrackerConfig] = Registry("tracker", TrackerConfig)
AnyTracker = Annotated[SerializeAsAny[TrackerConfig], PlainValidator(trackers.validate)]
"""Settings of whichever tracker their `name` says; as the other unions."""


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
    """The address of an MLflow store; raises ValueError for a scheme that MLflow does not have."""
    scheme, separator, _ = (uri or "").partition("://")
    if separator and scheme.partition("+")[0] not in SCHEMES:
        allowed = ", ".join(f"{name}://..." for name in SCHEMES)
        raise ValueError(f"given {uri!r}, allowed: {allowed}")
    return uri
