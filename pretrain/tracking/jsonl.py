"""`metrics.jsonl`: one object a line, always written, readable during the run.

Every line reaches the kernel before `log` returns, so that a killed process loses none. On resume
the lines after the checkpoint are dropped, because these steps are made again. So the file of an
interrupted run has the steps of an uninterrupted one, each once.
"""

from __future__ import annotations

import errno
import json
import math
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrain.tracking.guard import restore

if TYPE_CHECKING:
    from pretrain.tracking import Status


_WAITING_LINES = 10_000
"""Lines that are kept while the file cannot be written."""


class JsonlSink:
    """Sink that appends `{"step": ..., "time": ..., name: value, ...}` to one file.

    A line is in the file as a whole or not at all. Lines that a full disk refuses are kept and
    written first, with the next report. A file that somebody deletes is written again.
    """

    def __init__(
        self, path: Path, keep_to_step: int, *, report: Callable[[str], None] = print
    ) -> None:
        """Open `path`, keeping only the complete lines of steps up to `keep_to_step`."""
        path.parent.mkdir(parents=True, exist_ok=True)
        _truncate(path, keep_to_step)
        self._path, self._report = path, report
        self._file = path.open("a+b", buffering=0)
        self._waiting: deque[bytes] = deque()
        self._failing = False
        self._lost = 0

    def log(self, metrics: Mapping[str, float], step: int, time_s: float) -> None:
        """Append one line; numbers that JSON cannot write become "nan", "inf", "-inf"."""
        row: dict[str, float | str] = {"step": step, "time": round(time_s, 3)}
        row |= {k: v if math.isfinite(v) else str(v) for k, v in metrics.items()}
        self._waiting.append(json.dumps(row).encode() + b"\n")
        if len(self._waiting) > _WAITING_LINES:
            self._waiting.popleft()
            self._lost += 1
        self._write()

    def _write(self) -> None:
        """Write the waiting lines, in order; report where that fails and where it works again."""
        try:
            self._look_for_file()
            while self._waiting:
                _append(self._file, self._waiting[0])
                self._waiting.popleft()
        except OSError as error:
            if not self._failing:
                self._failing = True
                self._report(
                    f"warning: cannot write {self._path} ({error.strerror or error}); training "
                    f"goes on, up to {_WAITING_LINES:,} lines are kept and written later"
                )
            return
        if self._failing:
            self._failing = False
            lost = f"; {self._lost:,} lines were lost" if self._lost else ""
            self._report(f"{self._path} is written again{lost}")

    def _look_for_file(self) -> None:
        """Take care of a file that was deleted or replaced since the last line."""
        opened = os.fstat(self._file.fileno())
        try:
            if os.path.samestat(self._path.stat(), opened):
                return
            happened = "was replaced during the run; lines go to the new file"
        except FileNotFoundError:
            happened = "was deleted during the run; it was written again"
            self._file.seek(0)
            restore(self._path, self._file.read())
        replaced = self._path.open("a+b", buffering=0)
        self._file.close()
        self._file = replaced
        self._report(f"warning: {self._path} {happened}")

    def params(self, values: Mapping[str, Any]) -> None:
        """Do nothing: the settings are in config.yaml."""

    def artifact(self, path: Path, folder: str) -> None:
        """Do nothing: the artifacts are in the run folder."""

    def message(self, text: str) -> None:
        """Do nothing: the console shows messages."""

    def close(self, status: Status) -> None:
        """Write what waits and close the file."""
        self._write()
        if self._waiting:
            self._lost += len(self._waiting)
            self._report(f"warning: {self._lost:,} lines are missing in {self._path}")
        self._file.close()


def _append(file: FileIO, line: bytes) -> None:
    """Append a whole line, or raise OSError and leave the file as it was."""
    size = os.fstat(file.fileno()).st_size
    try:
        if file.write(line) != len(line):  # a full disk may take a part of it
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError:
        file.truncate(size)
        raise


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Read the measurements in `path`, in order; a truncated last line is left out."""
    return [row for row, _ in _complete_lines(path)]


def _complete_lines(path: Path) -> Iterator[tuple[dict[str, float], bytes]]:
    with path.open("rb") as file:
        for line in file:
            try:
                row = json.loads(line) if line.endswith(b"\n") else None
                numbers = {k: float(v) for k, v in row.items()} if isinstance(row, dict) else {}
            except (ValueError, TypeError, OverflowError, RecursionError):
                continue
            if "step" in numbers:
                yield numbers, line


def _truncate(path: Path, keep_to_step: int) -> None:
    """Drop later and incomplete lines by replacing the file as a whole."""
    if not path.exists():
        return
    kept = [line for row, line in _complete_lines(path) if row["step"] <= keep_to_step]
    restore(path, b"".join(kept))
