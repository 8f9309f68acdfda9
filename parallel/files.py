"""Reading files that somebody else may have written: bare names, regular files, plain JSON.

Names that come from a manifest are joined by `inside` alone: whoever wrote the manifest chooses the
name, so it must not lead out of the folder.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from io import BufferedReader
from pathlib import Path
from typing import Any

from parallel.errors import CheckpointError

NAME_BYTES = 200
JSON_BYTES = 64 << 20
"""Largest manifest or header; one of a model of 100,000 tensors has 30 MB."""
CONTAINERS = 1_000_000
"""Objects and arrays in one file; 64 MiB of nothing else would take 5 GB of memory."""


def check_name(name: str) -> str:
    """Return `name` if it is a bare file name, without folder; ValueError if it is none."""
    if not name or name[0] in ".-":
        raise ValueError("a file name is not empty and begins with neither '.' nor '-'")
    if "/" in name or "\\" in name:
        raise ValueError("a file name holds no folder ('/' or '\\')")
    if not name.isprintable():
        raise ValueError("a file name holds no NUL, control or invisible character")
    if len(name.encode()) > NAME_BYTES:
        raise ValueError(f"a file name has at most {NAME_BYTES} bytes")
    return name


def inside(root: Path, name: str) -> Path:
    """Path of the file `name` in `root`; CheckpointError where name or link leads elsewhere."""
    try:
        path = root / check_name(name)
    except ValueError as error:
        raise CheckpointError(f"{name!r} cannot be a file in {root}: {error}") from None
    if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root)):
        raise CheckpointError(
            f"{path} is a link to {os.path.realpath(path)}, outside its folder; "
            "copy the file there, or link the whole folder"
        )
    return path


def open_regular(path: Path) -> BufferedReader:
    """Open a file for reading; OSError also for pipes and devices, which could block for ever."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "not a regular file (a folder, pipe or device)", str(path))
    except OSError:
        os.close(descriptor)
        raise
    return open(descriptor, "rb")


def read_json(path: Path) -> Any:
    """Parse a JSON file; OSError if it cannot be read, ValueError if it is too large or no JSON."""
    with open_regular(path) as file:
        return parse_json(file.read(JSON_BYTES + 1))


def parse_json(content: bytes) -> Any:
    """Parse JSON; ValueError if it is too large, nested too deeply or no JSON."""
    if len(content) > JSON_BYTES:
        raise ValueError(f"it is larger than {JSON_BYTES:,} bytes")
    if content.count(b"{") + content.count(b"[") > CONTAINERS:
        raise ValueError(f"it holds more than {CONTAINERS:,} objects and arrays")
    try:
        return json.loads(content)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
