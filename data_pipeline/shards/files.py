"""Files of this machine: they appear whole or not at all, also when it stops in the middle.

Names that come from a manifest are joined by `inside` alone: whoever wrote the manifest chooses the
name, so it must not lead out of the folder.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from data_pipeline.errors import ShardError

NAME_BYTES = 200
"""Longest name of a file; the cache adds its prefix and endings, and systems allow 255."""


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
    """Path of the file `name` in `root`; ShardError for a name or link that leads elsewhere."""
    try:
        path = root / check_name(name)
    except ValueError as error:
        raise ShardError(f"{name!r} cannot be a file in {root}: {error}") from None
    if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root)):
        raise ShardError(
            f"{path} is a link to {os.path.realpath(path)}, outside its folder; "
            "copy the file there, or link the whole folder"
        )
    return path


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file that gets its name, synced, when the context ends well, and is deleted if not."""
    temporary = path.with_name(f"{path.name}.tmp{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        publish(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_atomically(path: Path, content: bytes | str) -> None:
    """Publish `content` under `path`."""
    with atomic_file(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def publish(temporary: Path, path: Path) -> None:
    """Rename a finished, synced file into place durably."""
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
