"""A tracker that writes a CSV file: name, step, value. Queue and retry are Epochal's."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from pretrain.config.run import Config
from pretrain.config.trackers import TrackerConfig, trackers
from pretrain.tracking import Status
from pretrain.tracking.queue import Point


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
        self._continued = resumed and self._path.exists()
        self._begun = False

    def connect(self) -> bool:
        """Begin the file, once; True where it goes on."""
        if not (self._begun or self._continued):
            self._path.write_text("name,step,value\n")
        self._begun = True
        return self._continued

    def log_points(self, points: list[Point]) -> None:
        """Append lines."""
        with self._path.open("a", newline="") as file:
            csv.writer(file).writerows((p.name, p.step, p.value) for p in points)

    def log_params(self, values: Mapping[str, Any]) -> None:
        """Settings stand in config.yaml."""

    def log_artifact(self, path: Path, folder: str) -> None:
        """Files lie in the run folder."""

    def end(self, status: Status) -> None:
        """Nothing to end."""

    def is_final(self, error: Exception) -> bool:
        """A full disk may have room again."""
        return False
