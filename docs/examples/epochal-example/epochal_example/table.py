"""A tracker that writes a CSV file: name, step, value. Queue and retry are Epochal's."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from pretrain.config.run import Config
from pretrain.config.trackers import TrackerConfig, trackers
from pretrain.tracking import Status
from pretrain.tracking.points import Point, once


@trackers.register
class TableConfig(TrackerConfig):
    """Settings."""

    name: Literal["table"] = "table"
    implementation: ClassVar[str] = "epochal_example.table:Table"

    file: str = "table.csv"
    """File in the run folder."""


class Table:
    """Client of the queue: its calls may block and raise, the run goes on."""

    def __init__(self, settings: TableConfig, config: Config, run_dir: Path, resumed: bool) -> None:
        self._path = run_dir / settings.file
        self.address = str(self._path)

    def connect(self) -> None:
        """A file needs no connection."""

    def lacking(self, recorded: Sequence[Point]) -> list[Point]:
        """Begin the file anew, so that it lacks every point; a server would be asked."""
        self._path.write_text("name,step,value\n")
        return once(recorded)

    def log_points(self, points: list[Point]) -> None:
        """Append lines."""
        with self._path.open("a", newline="") as file:
            csv.writer(file).writerows((p.name, p.step, p.value) for p in points)

    def log_params(self, values: Mapping[str, Any]) -> None:
        """Settings stand in config.yaml."""

    def log_artifact(self, path: Path, folder: str) -> None:
        """Files lie in the run folder."""

    def end(self, status: Status, time_ms: int) -> None:
        """Nothing to end."""

    def is_final(self, error: Exception) -> bool:
        """A full disk may have room again."""
        return False
