"""Manifest of a checkpoint: one JSON file, written last, that names and hashes the rest.

A folder without a readable manifest, or whose files have other sizes, is not a checkpoint. Reading
one is cheap; the hashes are compared where tensors are loaded.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from parallel.engine.optimizer import EMA, TEACHER, Kind
from parallel.errors import CheckpointError

FORMAT = "epochal-checkpoint/1"
NAME = "manifest.json"
WEIGHTS = "weights.safetensors"
AVERAGES = "ema.safetensors"
TEACHER_WEIGHTS = "teacher.safetensors"


@dataclass(frozen=True)
class FileEntry:
    """One file of a checkpoint."""

    sha256: str
    bytes: int


@dataclass(frozen=True)
class Manifest:
    """Contents of `manifest.json`."""

    format: str
    step: int
    optimizer_step: int
    """Updates that the optimizer has applied; without skipped steps the same as `step`."""
    layout: dict[str, Any]
    """Degrees under which it was written: for people, as loading does not depend on it."""
    zero_stage: int
    precision: str
    shapes: dict[str, list[int]]
    """Whole shape of every parameter by canonical name."""
    tensors: dict[str, str]
    """File that holds each tensor: `PARAMETER` for weights, `KIND/PARAMETER` for other kinds."""
    files: dict[str, FileEntry]
    state: dict[str, Any]
    """State of the caller, among it the data cursor."""

    @property
    def has_ema(self) -> bool:
        """True if it holds averaged weights."""
        return AVERAGES in self.files

    @property
    def optimizer_state(self) -> set[Kind]:
        """Kinds of state that its optimizer kept; empty where it holds none."""
        return {kind_of(key) for key in self.tensors} - {"", EMA, TEACHER}

    def to_json(self) -> str:
        """Text of the file; equal manifests give equal text."""
        return json.dumps(asdict(self), indent=1, sort_keys=True)


def kind_of(key: str) -> Kind:
    """Kind of a tensor by its name inside a checkpoint; "" for a weight."""
    return key.rpartition("/")[0]


def read_manifest(path: Path) -> Manifest:
    """Manifest of the checkpoint folder `path`; CheckpointError when it is incomplete."""
    try:
        raw = json.loads((path / NAME).read_text())
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} is not a complete checkpoint: it has no {NAME}. Name a folder step-... of the "
            "run, or remove it"
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path / NAME} cannot be read: {error}") from None
    if raw.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} has checkpoint format {raw.get('format')!r}; this version reads {FORMAT}"
        )
    raw["files"] = {name: FileEntry(**entry) for name, entry in raw["files"].items()}
    manifest = Manifest(**raw)
    for name, entry in manifest.files.items():
        size = (path / name).stat().st_size if (path / name).is_file() else None
        if size != entry.bytes:
            found = "is missing" if size is None else f"has {size:,} bytes"
            raise CheckpointError(
                f"checkpoint {path} is damaged: {name} {found}, its manifest says "
                f"{entry.bytes:,} bytes"
            )
    return manifest


def verify_files(path: Path, manifest: Manifest, names: Iterable[str]) -> None:
    """Compare the hashes of these files of the checkpoint; CheckpointError at a difference."""
    for name in names:
        with (path / name).open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != manifest.files[name].sha256:
            raise CheckpointError(
                f"checkpoint {path} is damaged: the hash of {name} is {found[:16]}..., its "
                f"manifest says {manifest.files[name].sha256[:16]}..."
            )


def write_synced(path: Path, text: str) -> None:
    """Write and flush a small file, to survive a power cut; OSError when the disk refuses."""
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Flush the names in a folder, so that they survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
