"""Settings of trackers: services that get a run's measurements, in addition to `metrics.jsonl`.

Free of torch. Adding one is described in docs/extending.md.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import PlainValidator, SerializeAsAny, field_validator

from pretrain.config.registry import Component, Registry
from pretrain.config.secrets import redacted

SCHEMES = (
    "http", "https", "file", "sqlite", "postgresql", "mysql", "mssql", "databricks",
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
    if separator and scheme.partition("+")[0] not in SCHEMES:
        allowed = ", ".join(f"{name}://..." for name in SCHEMES)
        raise ValueError(f"given {redacted(uri or '')!r}, allowed: {allowed}")
    return uri
