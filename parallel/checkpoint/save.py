"""Saving: every rank writes its share of the tensors, and one rename makes the checkpoint exist.

A checkpoint holds whole float32 tensors under canonical names, not the shards of a layout: the
weights once, in one file that evaluation reads alone, averaged weights and those of a teacher
likewise, and the Adam moments spread over the ranks.
Gathering costs one pass over the network per save; in return every layout and ZeRO stage reads what
any other wrote, bit for bit, and no pickle is ever loaded. All ranks must see the same file system.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.distributed as dist

from parallel.checkpoint.manifest import (
    AVERAGES,
    FORMAT,
    NAME,
    TEACHER_WEIGHTS,
    WEIGHTS,
    FileEntry,
    Manifest,
    read_manifest,
    sync_folder,
    write_synced,
)
from parallel.checkpoint.writer import TensorWriter
from parallel.engine import Engine
from parallel.errors import CheckpointError, SaveError
from parallel.fragments import EMA, MOMENTS, TEACHER, Kind

COPIES: dict[Kind, str] = {EMA: AVERAGES, TEACHER: TEACHER_WEIGHTS}
"""Further weights of the whole model, each in a file of its own."""


def save_checkpoint(
    engine: Engine, folder: Path, step: int, state: dict[str, Any], keep: int = 0
) -> Path:
    """Write `folder/step-XXXXXXXX` and remove all but the newest `keep` (0 keeps all); collective.

    `state` is the caller's own, JSON only. Raises SaveError on every rank when any rank could not
    write; earlier checkpoints are then untouched and the unfinished one is gone. `keep` counts
    complete checkpoints.
    """
    rank = engine.topology.rank
    final = folder / f"step-{step:08d}"
    partial = folder / f".tmp-step-{step:08d}"
    error: str | None = None
    if rank == 0:
        error = _attempt(lambda: _make_empty(folder, partial))
    _agree(error, folder, partial, rank)
    plan = _Plan(engine)
    entries, error = _write_share(engine, plan, partial)
    _agree(error, folder, partial, rank)
    collected: list[dict[str, FileEntry] | None] = [None] * engine.topology.world_size
    dist.all_gather_object(collected, entries)
    error = None
    if rank == 0:
        files = {name: entry for part in collected if part for name, entry in part.items()}
        manifest = Manifest(
            format=FORMAT,
            step=step,
            optimizer_step=plan.optimizer_step,
            layout=asdict(engine.topology.layout),
            zero_stage=engine.config.zero_stage,
            precision=engine.config.precision,
            shapes=plan.shapes,
            tensors=plan.tensors,
            files=files,
            state=state,
        )
        error = _attempt(lambda: _commit(manifest, partial, final))
    _agree(error, folder, partial, rank)
    if rank == 0 and keep > 0:
        _prune(folder, keep)
    return final


class _Plan:
    """Which rank writes which tensor into which file; the same on every rank."""

    def __init__(self, engine: Engine) -> None:
        self.shapes = engine.shapes
        self.optimizer_step = engine.optimizer_step
        self.order: list[tuple[str, Kind]] = []
        """Every tensor, in the order in which all ranks gather them."""
        self.tensors: dict[str, str] = {}
        self.owner: dict[str, int] = {WEIGHTS: 0}
        """Rank that writes each file."""
        kinds = engine.kinds
        moments = [kind for kind in MOMENTS if kind in kinds]
        load = [0] * engine.topology.world_size
        whole = sum(_numel(shape) for shape in self.shapes.values())
        load[0] = whole
        copies = {kind: file for kind, file in COPIES.items() if kind in kinds}
        for file in copies.values():
            self.owner[file] = load.index(min(load))
            load[self.owner[file]] += whole
        for name, shape in self.shapes.items():
            self.order.append((name, "weight"))
            self.tensors[name] = WEIGHTS
            for kind, file in copies.items():
                self.order.append((name, kind))
                self.tensors[key(name, kind)] = file
            if not moments:
                continue
            owner = load.index(min(load))
            load[owner] += len(moments) * _numel(shape)
            file = f"optimizer-{owner:05d}.safetensors"
            self.owner[file] = owner
            for moment in moments:
                self.order.append((name, moment))
                self.tensors[key(name, moment)] = file

    def share(self, rank: int) -> dict[str, dict[str, list[int]]]:
        """Shapes of the tensors in each file that `rank` writes, in writing order."""
        files: dict[str, dict[str, list[int]]] = {}
        for name, kind in self.order:
            file = self.tensors[key(name, kind)]
            if self.owner[file] == rank:
                files.setdefault(file, {})[key(name, kind)] = self.shapes[name]
        return files


def key(name: str, kind: Kind) -> str:
    """Name of a tensor inside a checkpoint."""
    return name if kind == "weight" else f"{kind}/{name}"


def _numel(shape: list[int]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def _write_share(
    engine: Engine, plan: _Plan, partial: Path
) -> tuple[dict[str, FileEntry], str | None]:
    """Gather every tensor with all ranks and write this rank's; entries of its files, or an error.

    After an error the rank goes on gathering, because the others wait for it.
    """
    writers: dict[str, TensorWriter] = {}
    entries: dict[str, FileEntry] = {}
    error: str | None = None
    try:
        for file, shapes in plan.share(engine.topology.rank).items():
            writers[file] = TensorWriter(partial / file, shapes)
    except OSError as failure:
        error = _explain(failure)
    for name, kind in plan.order:
        tensor = engine.read(name, kind)
        writer = writers.get(plan.tensors[key(name, kind)])
        if writer is None or error is not None:
            continue
        try:
            writer.append(key(name, kind), tensor)
        except OSError as failure:
            error = _explain(failure)
    if error is None:
        try:
            entries = {file: writer.close() for file, writer in writers.items()}
        except OSError as failure:
            error = _explain(failure)
    if error is not None:
        for writer in writers.values():
            writer.abandon()
    return entries, error


def _make_empty(folder: Path, partial: Path) -> None:
    """An empty folder to write into; what a killed save left behind goes first."""
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(".tmp-step-*"):
        shutil.rmtree(left)
    partial.mkdir()


def _commit(manifest: Manifest, partial: Path, final: Path) -> None:
    """Write the manifest and rename; from then on the checkpoint exists."""
    write_synced(partial / NAME, manifest.to_json())
    sync_folder(partial)
    if final.exists():
        # The same step again. A crash between the two renames costs this step, no earlier one.
        aside = final.with_name(f".tmp-{final.name}-replaced")
        os.rename(final, aside)
        os.rename(partial, final)
        shutil.rmtree(aside)
    else:
        os.rename(partial, final)
    sync_folder(final.parent)


def _prune(folder: Path, keep: int) -> None:
    """Remove the oldest complete checkpoints beyond `keep`; damaged ones stay for a person."""
    complete = []
    for path in sorted(folder.glob("step-*"), reverse=True):
        try:
            read_manifest(path)
        except CheckpointError:
            continue
        complete.append(path)
    for path in complete[keep:]:
        aside = path.with_name(f".tmp-{path.name}-pruned")
        os.rename(path, aside)
        shutil.rmtree(aside, ignore_errors=True)


def _attempt(action: Any) -> str | None:
    """Run a file operation of rank 0; its error as text."""
    try:
        action()
    except OSError as failure:
        return _explain(failure)
    return None


def _explain(failure: OSError) -> str:
    return f"{failure.strerror or failure} ({failure.filename or 'while writing'})"


def _agree(error: str | None, folder: Path, partial: Path, rank: int) -> None:
    """Let every rank know whether any failed; then the unfinished folder goes and all raise."""
    errors: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    failed: Mapping[int, str] = {r: e for r, e in enumerate(errors) if e is not None}
    if not failed:
        return
    if rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
    dist.barrier()
    text = "; ".join(f"rank {r}: {e}" for r, e in failed.items())
    raise SaveError(
        f"the checkpoint could not be written to {folder}: {text}. Earlier checkpoints are "
        "untouched; free some space or choose another folder"
    )
