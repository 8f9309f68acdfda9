"""Manifest of a checkpoint: one JSON file, written last, that names and hashes the rest.

A folder without a readable manifest, or whose files have other sizes, is not a checkpoint. Reading
one is cheap; the hashes are compared where tensors are loaded.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from parallel.engine.optimizer import EMA, TEACHER, Kind
from parallel.errors import CheckpointError
from parallel.files import check_name, inside, open_regular, read_json

FORMAT = "epochal-checkpoint/1"
NAME = "manifest.json"
WEIGHTS = "weights.safetensors"
AVERAGES = "ema.safetensors"
TEACHER_WEIGHTS = "teacher.safetensors"
SUFFIX = ".safetensors"
LARGEST = 2**53
"""Largest number: every JSON reader has it exactly."""


Number = Annotated[int, Field(strict=True, ge=0, le=LARGEST)]
_STRICT = ConfigDict(extra="forbid")


@dataclass(frozen=True)
class FileEntry:
    """One file of a checkpoint."""

    __pydantic_config__: ClassVar = _STRICT
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    bytes: Number


@dataclass(frozen=True)
class Manifest:
    """Contents of `manifest.json`."""

    __pydantic_config__: ClassVar = _STRICT
    format: str
    step: Number
    optimizer_step: Number
    """Updates that the optimizer has applied; without skipped steps the same as `step`."""
    layout: dict[str, Any]
    """Degrees under which it was written: for people, as loading does not depend on it."""
    zero_stage: Annotated[int, Field(strict=True, ge=0, le=3)]
    precision: Annotated[str, Field(max_length=32)]
    shapes: dict[str, Annotated[list[Number], Field(max_length=8)]]
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


_SCHEMA = TypeAdapter(Manifest)


def kind_of(key: str) -> Kind:
    """Kind of a tensor by its name inside a checkpoint; "" for a weight."""
    return key.rpartition("/")[0]


def read_manifest(path: Path) -> Manifest:
    """Manifest of the checkpoint folder `path`; CheckpointError when it is incomplete."""
    try:
        raw = read_json(path / NAME)
        if not isinstance(raw, dict):
            raise ValueError("it is no JSON object")
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
    try:
        manifest = _SCHEMA.validate_python(raw)
        _check_tensors(manifest)
    except ValidationError as error:
        raise CheckpointError(f"checkpoint {path} is damaged: {NAME}: {_first(error)}") from None
    except ValueError as error:
        raise CheckpointError(f"checkpoint {path} is damaged: {NAME}: {error}") from None
    for name, entry in manifest.files.items():
        file = inside(path, name)
        size = file.stat().st_size if file.is_file() else None
        if size != entry.bytes:
            found = "is missing" if size is None else f"has {size:,} bytes"
            raise CheckpointError(
                f"checkpoint {path} is damaged: {name} {found}, its manifest says "
                f"{entry.bytes:,} bytes"
            )
    return manifest


def manifest_hash(path: Path) -> str:
    """SHA-256 of the manifest of the checkpoint `path`: as that has the hashes of all files, of the
    whole checkpoint. Raises CheckpointError where it cannot be read."""
    try:
        with open_regular(path / NAME) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path / NAME} cannot be read: {error}") from None


def _first(error: ValidationError) -> str:
    """Place and reason of the first problem, and the number of further ones."""
    found = error.errors(include_url=False, include_context=False, include_input=False)
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    return f"{'.'.join(map(str, found[0]['loc']))}: {found[0]['msg']}{more}"


def _check_tensors(manifest: Manifest) -> None:
    """Raise ValueError unless files, tensors and shapes belong together."""
    for name, shape in manifest.shapes.items():
        if "/" in name or not name.isprintable():
            raise ValueError(f"shapes: {name!r} cannot be the name of a parameter")
        if math.prod(shape) > LARGEST:
            raise ValueError(f"shapes: {name} has {math.prod(shape):,} elements")
    kinds = {kind_of(key) for key in manifest.tensors} | {""}
    every = {f"{kind}/{name}" if kind else name for kind in kinds for name in manifest.shapes}
    # Weights and averages are complete; an optimizer's groups keep different state, which the
    # optimizer that loads it checks.
    needed = {key for key in every if kind_of(key) in ("", EMA, TEACHER)}
    found = manifest.tensors.keys()
    if different := sorted(found - every) or sorted(needed - found):
        raise ValueError(f"tensors and shapes do not name the same parameters: {different[0]!r}")
    own = {"": WEIGHTS, EMA: AVERAGES, TEACHER: TEACHER_WEIGHTS}
    for key, file in manifest.tensors.items():
        if own.get(kind_of(key), file) != file or (
            kind_of(key) not in own and file in own.values()
        ):
            raise ValueError(f"tensors: {key} cannot be in {file}")
    if different := sorted(set(manifest.tensors.values()) ^ manifest.files.keys()):
        raise ValueError(f"tensors and files do not name the same files: {different[0]!r}")
    for name in manifest.files:
        if not check_name(name).endswith(SUFFIX):
            raise ValueError(f"files: {name!r} does not end with {SUFFIX}")


def verify_files(path: Path, manifest: Manifest, names: Iterable[str]) -> None:
    """Compare hashes and headers of these files of the checkpoint; CheckpointError if they differ.

    What has the right hash may still be no file of tensors, where its writer was not this package.
    """
    for name in names:
        with open_regular(inside(path, name)) as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != manifest.files[name].sha256:
            raise CheckpointError(
                f"checkpoint {path} is damaged: the hash of {name} is {found[:16]}..., its "
                f"manifest says {manifest.files[name].sha256[:16]}..."
            )
        if problem := _header_problem(path / name, manifest):
            raise CheckpointError(f"checkpoint {path} is damaged: {name}: {problem}")


def _header_problem(file: Path, manifest: Manifest) -> str | None:
    """Difference between the tensors in a file and those that the manifest says it holds."""
    from safetensors import SafetensorError, safe_open

    wanted = {key for key, place in manifest.tensors.items() if place == file.name}
    try:
        with safe_open(file, framework="pt") as opened:
            if different := sorted(wanted ^ set(opened.keys())):
                word = "lacks" if different[0] in wanted else "holds besides"
                return f"it {word} the tensor {different[0]!r}"
            for key in wanted:
                tensor = opened.get_slice(key)
                dtype, shape = tensor.get_dtype(), list(tensor.get_shape())
                right = manifest.shapes[key.rpartition("/")[2]]
                if dtype != "F32" or shape != right:
                    return f"{key} is {dtype} {shape}, it should be F32 {right}"
    except (SafetensorError, OSError) as error:
        return f"it is no safetensors file ({error})"
    return None


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
