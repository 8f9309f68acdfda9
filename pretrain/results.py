"""Results that commands append to a run folder: evaluations and samples."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def append_results(path: Path, results: Iterable[dict[str, Any]]) -> None:
    """Append a JSON line for each result; a folder that cannot be written gets a warning only."""
    try:
        with path.open("a") as log:
            log.writelines(json.dumps(result) + "\n" for result in results)
    except OSError as error:
        print(f"warning: {path} is not written ({error.strerror})", file=sys.stderr)
