"""Guard of a small file that a run needs later: written again where somebody deletes it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pretrain.tracking import Status


class GuardSink:
    """Sink that looks at each report whether the file is still there."""

    def __init__(self, path: Path, *, report: Callable[[str], None]) -> None:
        """Remember the content; raises OSError where there is no such file."""
        self._path, self._content, self._report = path, path.read_bytes(), report
        self._failing = False

    def log(self, metrics: Mapping[str, float], step: int, time_s: float) -> None:
        """Write the file again if it is gone."""
        if self._path.exists():
            return
        try:
            restore(self._path, self._content)
        except OSError as error:
            if not self._failing:
                self._report(f"warning: {self._path} was deleted and cannot be written: {error}")
            self._failing = True
            return
        self._failing = False
        self._report(f"warning: {self._path} was deleted during the run; it was written again")

    def params(self, values: Mapping[str, Any]) -> None:
        """Do nothing: the file has the settings."""

    def artifact(self, path: Path, folder: str) -> None:
        """Do nothing: the artifacts are in the run folder."""

    def message(self, text: str) -> None:
        """Do nothing: the console shows messages."""

    def close(self, status: Status) -> None:
        """Look once more."""
        self.log({}, 0, 0.0)


def restore(path: Path, content: bytes) -> None:
    """Write a file as a whole, with its folder; raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_bytes(content)
    os.replace(partial, path)
