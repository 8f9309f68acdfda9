"""Results of rows as a JSON file that is whole after every row, whatever ends the process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gpu_day.plan import Row

UNFINISHED = "the process ended in this row"


class Results:
    """Everything found so far; `path` None keeps it in memory only."""

    def __init__(self, path: Path | None, found: dict[str, Any]) -> None:
        self.path = path
        self.found = {"cudnn": True, "rows": [], **found}

    @staticmethod
    def read(path: Path) -> dict[str, Any]:
        """Findings of an earlier process, less what it had no time for; nothing without a file."""
        if not path.is_file():
            return {}
        found = json.loads(path.read_text())
        return {**found, "rows": [row for row in found["rows"] if "skipped" not in row]}

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Entries in the order of measurement."""
        return self.found["rows"]

    def lacks(self, row: Row) -> bool:
        """True while the row is to be measured: never tried, or worth another try."""
        return row.label not in {entry["label"] for entry in self.rows if "again" not in entry}

    def begin(self, row: Row) -> dict[str, Any]:
        """The entry of a row, written as failed before it is measured."""
        entry = {"label": row.label, **row.as_dict(), "error": UNFINISHED}
        self.rows.append(entry)
        self.save()
        del entry["error"]
        return entry

    def skip(self, row: Row, why: str) -> None:
        """Note that a row was not tried."""
        self.rows.append({"label": row.label, **row.as_dict(), "skipped": why})
        self.save()

    def save(self) -> None:
        """Write the file; a reader never sees half of it."""
        if self.path is not None:
            partial = self.path.with_name(self.path.name + ".partial")
            partial.write_text(json.dumps(self.found, indent=1))
            partial.replace(self.path)
