"""The hostfile: machines and the number of ranks on each. Checked before DeepSpeed reads it.

DeepSpeed trains locally, with a warning, when the file does not exist; here that is an error.
"""

from __future__ import annotations

import re
from pathlib import Path

from cluster.errors import ClusterError

_LINE = re.compile(r"(\S+)\s+slots=([0-9]{1,5})\s*(?:#.*)?")
_EXAMPLE = "cluster/hostfile.example shows the format"


def read_hostfile(path: Path) -> dict[str, int]:
    """Host -> ranks, in the file's order; raises ClusterError for anything DeepSpeed misreads."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ClusterError(
            f"cannot read the hostfile {path}: {reason}; {_EXAMPLE}, and without a hostfile "
            f"(parallel.hostfile=null) all ranks start on this machine"
        ) from None
    slots: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        match = _LINE.fullmatch(text)
        if match is None or int(match[2]) < 1:
            raise ClusterError(
                f"{path}:{number}: {text!r}; write NAME slots=RANKS, e.g. n1 slots=8"
            )
        if match[1] in slots:
            raise ClusterError(f"{path}:{number}: host {match[1]} is named twice")
        slots[match[1]] = int(match[2])
    if not slots:
        raise ClusterError(f"{path} names no host; {_EXAMPLE}")
    return slots
