"""The hostfile: which machines, how many ranks on each. Checked before DeepSpeed reads it.

DeepSpeed trains locally, with a warning, when the file does not exist; here that is an error.
"""

from __future__ import annotations

import re
from pathlib import Path

from pretrain.errors import ConfigError

_LINE = re.compile(r"(\S+)\s+slots=(\d+)\s*(?:#.*)?")


def read_hostfile(path: Path) -> dict[str, int]:
    """Host -> ranks, in the file's order; raises ConfigError for anything DeepSpeed misreads."""
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"cannot read parallel.hostfile {path}: {reason}; "
            f"null trains on this machine, cluster/hostfile.example shows the format"
        ) from None
    slots: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        match = _LINE.fullmatch(text)
        if match is None or int(match[2]) < 1:
            raise ConfigError(f"{path}:{number}: {text!r}; write NAME slots=RANKS, e.g. n1 slots=8")
        if match[1] in slots:
            raise ConfigError(f"{path}:{number}: host {match[1]} is named twice")
        slots[match[1]] = int(match[2])
    if not slots:
        raise ConfigError(f"{path} names no host; cluster/hostfile.example shows the format")
    return slots
