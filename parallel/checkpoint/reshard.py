"""A checkpoint as another checkpoint: verified, its state over other files, or without it.

Every layout reads every checkpoint, so nothing has to be converted before a run goes on elsewhere.
What is left to do is housekeeping: prove that a copy is whole, drop what only training needs, and
spread the optimizer's state over files that a store accepts. One tensor is in memory at a time; no
process group.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from parallel.checkpoint.folder import Target, attempt, commit, make_empty
from parallel.checkpoint.manifest import FileEntry, Manifest, kind_of, read_manifest, verify_files
from parallel.checkpoint.writer import TensorWriter
from parallel.errors import CheckpointError, SaveError


def verify_checkpoint(path: Path) -> Manifest:
    """Manifest of a checkpoint whose every byte is as written; else CheckpointError."""
    manifest = read_manifest(path)
    verify_files(path, manifest, sorted(manifest.files))
    return manifest


def reshard_checkpoint(
    path: Path,
    folder: Path,
    *,
    weights_only: bool = False,
    files: int | None = None,
    change_state: Callable[[dict[str, Any]], dict[str, Any]] = dict,
) -> Path:
    """Write the checkpoint at `path` again as `folder/step-XXXXXXXX`; return its path.

    `weights_only` drops the optimizer's state: the copy can be evaluated, sampled, exported and
    started from, but training that goes on from it begins with fresh state. `files` spreads that
    state over so many files of about equal size (default: as many as there are). Tensors are the
    same bit for bit; the caller's state is what `change_state` makes of it. Raises CheckpointError
    when the source is damaged or the copy exists, SaveError when it cannot be written.
    """
    manifest = verify_checkpoint(path)
    target = Target(folder, manifest.step)
    if target.final.exists():
        raise CheckpointError(f"{target.final} exists already; name another folder")
    tensors = _spread(manifest, weights_only, files)
    error = attempt(lambda: make_empty(target))
    entries: dict[str, FileEntry] = {}
    if error is None:
        error = attempt(lambda: entries.update(_copy(path, manifest, tensors, target.partial)))
    if error is None:
        step = 0 if weights_only else manifest.optimizer_step
        state = change_state(manifest.state)
        made = replace(manifest, tensors=tensors, files=entries, optimizer_step=step, state=state)
        error = attempt(lambda: commit(made, target))
    if error is not None:
        shutil.rmtree(target.partial, ignore_errors=True)
        raise SaveError(f"{target.final} could not be written: {error}")
    return target.final


def _spread(manifest: Manifest, weights_only: bool, files: int | None) -> dict[str, str]:
    """File of each tensor of the copy."""
    kinds = manifest.optimizer_state
    state = {key for key in manifest.tensors if kind_of(key) in kinds}
    kept = {key: file for key, file in manifest.tensors.items() if key not in state}
    if weights_only:
        return kept
    if files is None:
        return dict(manifest.tensors)
    load = [0] * files
    for key in sorted(state, key=lambda key: (-_numel(manifest, key), key)):
        lightest = load.index(min(load))
        load[lightest] += _numel(manifest, key)
        kept[key] = f"optimizer-{lightest:05d}.safetensors"
    return kept


def _copy(
    path: Path, manifest: Manifest, tensors: dict[str, str], partial: Path
) -> dict[str, FileEntry]:
    """Write every tensor into its file; return the entries of the files."""
    from safetensors import safe_open

    entries = {}
    with ExitStack() as stack:
        sources = {
            file: stack.enter_context(safe_open(path / file, framework="pt"))
            for file in set(manifest.tensors.values())
        }
        for file in sorted(set(tensors.values())):
            keys = [key for key, place in tensors.items() if place == file]
            writer = TensorWriter(partial / file, {key: _shape(manifest, key) for key in keys})
            for key in keys:
                writer.append(key, sources[manifest.tensors[key]].get_tensor(key))
            entries[file] = writer.close()
    return entries


def _shape(manifest: Manifest, key: str) -> list[int]:
    """Shape of a tensor: that of its parameter. Names of parameters hold no slash."""
    return manifest.shapes[key.rsplit("/", 1)[-1]]


def _numel(manifest: Manifest, key: str) -> int:
    return torch.Size(_shape(manifest, key)).numel()
