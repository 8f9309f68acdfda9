"""Saving: every rank writes its share of the tensors, and one rename makes the checkpoint exist.

A checkpoint holds whole float32 tensors under canonical names, not the shards of a layout: the
weights once, in one file that evaluation reads alone, averaged weights and those of a teacher
likewise, and the state of the optimizer spread over the ranks. Gathering costs one pass over the
network per save; in return every layout and ZeRO stage reads what any other wrote, bit for bit, and
no pickle is ever loaded. All ranks must see the same file system. `parallel.checkpoint.background`
writes while training goes on.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from parallel.checkpoint.folder import Target, attempt, commit, explain, make_empty
from parallel.checkpoint.manifest import FileEntry
from parallel.checkpoint.plan import SavePlan, key
from parallel.checkpoint.writer import TensorWriter
from parallel.engine.base import Engine
from parallel.errors import SaveError


def save_checkpoint(
    engine: Engine,
    folder: Path,
    step: int,
    state: dict[str, Any],
    keep: int = 0,
    *,
    forever: bool = False,
) -> Path:
    """Write `folder/step-XXXXXXXX` and remove all but the newest `keep` (0 keeps all); collective.

    `state` is that of the caller, JSON only. Raises SaveError on every rank when any rank could not
    write; earlier checkpoints are then untouched and the unfinished one is gone. `keep` counts
    complete checkpoints, except those that were saved `forever`: they are never removed.
    """
    target, rank = Target(folder, step, keep, forever), engine.topology.rank
    start(target, rank)
    plan = SavePlan(engine)
    entries, error = _write_share(engine, plan, target.partial)
    finish(target, rank, plan, state, entries, error)
    return target.final


def start(target: Target, rank: int) -> None:
    """Make the hidden folder; collective. Raises SaveError on every rank."""
    agree(attempt(lambda: make_empty(target)) if rank == 0 else None, target, rank)


def finish(
    target: Target,
    rank: int,
    plan: SavePlan,
    state: dict[str, Any],
    entries: dict[str, FileEntry],
    error: str | None,
) -> None:
    """Make the checkpoint exist once every rank has written its share; collective.

    `entries` and `error` are the result of this rank's share. Raises SaveError on every rank.
    """
    agree(error, target, rank)
    collected: list[dict[str, FileEntry]] = [{}] * dist.get_world_size()
    dist.all_gather_object(collected, entries)
    if rank == 0:
        files = {name: entry for part in collected for name, entry in part.items()}
        manifest = plan.manifest(target.step, state, files)
        error = attempt(lambda: commit(manifest, target))
    agree(error, target, rank)


def agree(error: str | None, target: Target, rank: int) -> None:
    """Exchange errors; if any rank has one, remove the unfinished folder and raise on all ranks."""
    errors: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    failed: Mapping[int, str] = {r: e for r, e in enumerate(errors) if e is not None}
    if not failed:
        return
    if rank == 0:
        shutil.rmtree(target.partial, ignore_errors=True)
    dist.barrier()
    text = "; ".join(f"rank {r}: {e}" for r, e in failed.items())
    raise SaveError(
        f"the checkpoint of step {target.step} could not be written to {target.folder}: {text}. "
        "Earlier checkpoints are untouched; free some space or choose another folder"
    )


def _write_share(
    engine: Engine, plan: SavePlan, partial: Path
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
        error = explain(failure)
    for name, kind in plan.order:
        tensor = engine.read(name, kind)
        writer = writers.get(plan.tensors[key(name, kind)])
        if writer is None or error is not None:
            continue
        try:
            writer.append(key(name, kind), tensor)
        except OSError as failure:
            error = explain(failure)
    if error is None:
        try:
            entries = {file: writer.close() for file, writer in writers.items()}
        except OSError as failure:
            error = explain(failure)
    if error is not None:
        for writer in writers.values():
            writer.abandon()
    return entries, error
