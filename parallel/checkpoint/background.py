"""Saving in the background: the step pays for a copy, a thread for writing and hashing.

`save` gathers every tensor as a blocking save does, but each rank only keeps its share in host
memory and returns; a thread of each rank then writes, hashes and flushes it. That thread calls no
collective: those of the training thread would have to come in the same order on every rank, and on
NCCL would block the step. Instead each rank writes a marker file once its files are safe on the
disk, which all ranks share anyway, and the thread of rank 0 commits when all markers are there. The
training threads meet again in `finish`, where the markers no longer matter: entries of the files
are exchanged by a collective. So a file system that shows markers late, or a disk too full for one,
costs time and nothing else. Killed at any moment, the hidden folder is no checkpoint.
"""

from __future__ import annotations

import copy
import json
import os
import threading
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from parallel.checkpoint import save
from parallel.checkpoint.folder import Target, attempt, commit, explain
from parallel.checkpoint.manifest import FileEntry
from parallel.checkpoint.plan import SavePlan, key
from parallel.checkpoint.writer import TensorWriter
from parallel.engine.base import Engine

POLL_SECONDS = 0.2
"""Interval in which the thread of rank 0 looks for the markers of the others."""


class BackgroundSaver:
    """Writer of one checkpoint at a time while training goes on."""

    def __init__(self) -> None:
        self._pending: _PendingSave | None = None

    def save(
        self,
        engine: Engine,
        folder: Path,
        step: int,
        state: dict[str, Any],
        keep: int = 0,
        *,
        forever: bool = False,
    ) -> None:
        """Begin what `save_checkpoint` does, and return once this rank's share is copied.

        Collective. `finish` the save before it first. Raises SaveError on every rank when the
        folder cannot be made; what goes wrong later is raised by `finish`.
        """
        assert self._pending is None, "finish the checkpoint in flight first"
        target = Target(folder, step, keep, forever)
        save.start(target, engine.topology.rank)
        plan = SavePlan(engine)
        self._pending = _PendingSave(
            target, plan, copy.deepcopy(state), _snapshot(engine, plan), engine.topology.rank
        )

    def committed(self) -> Path | None:
        """Checkpoint that has become complete since the last call; known on rank 0 only."""
        if self._pending is None or not self._pending.committed or self._pending.reported:
            return None
        self._pending.reported = True
        return self._pending.target.final

    def finish(self) -> Path | None:
        """Wait for the checkpoint in flight, if there is one; collective.

        Returns its path, unless `committed` has returned it already. Raises SaveError on every rank
        when it could not be written.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return None
        pending.stop()
        save.agree(pending.error, pending.target, pending.rank)
        # All shares are on the disk, but the thread of rank 0 may not have seen that.
        collected: list[dict[str, FileEntry]] = [{}] * dist.get_world_size()
        dist.all_gather_object(collected, pending.entries)
        if pending.rank == 0 and not pending.committed:
            pending.commit(collected)
        save.agree(pending.error, pending.target, pending.rank)
        return None if pending.reported else pending.target.final

    def close(self, seconds: float = 60.0) -> None:
        """Wait so long for a checkpoint in flight, without the other ranks; for a failed run."""
        if self._pending is not None:
            self._pending.thread.join(seconds)
            self._pending = None


class _PendingSave:
    """Checkpoint on its way from memory to the disk, on one rank."""

    def __init__(
        self,
        target: Target,
        plan: SavePlan,
        state: dict[str, Any],
        share: dict[str, dict[str, Tensor]],
        rank: int,
    ) -> None:
        self.target, self.rank = target, rank
        self.entries: dict[str, FileEntry] = {}
        self.error: str | None = None
        self.written = threading.Event()
        """Event set once this rank's share is on the disk or has failed."""
        self.committed = False
        self.reported = False
        self._plan, self._state, self._share = plan, state, share
        self._world_size = dist.get_world_size()
        self._stop = threading.Event()
        # A daemon: a run that dies does not wait for its last, unfinished checkpoint.
        self.thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        self.thread.start()

    def stop(self) -> None:
        """Wait until this rank's share is written; its thread looks for no more markers."""
        self.written.wait()
        self._stop.set()
        self.thread.join()

    def commit(self, parts: list[dict[str, FileEntry]]) -> None:
        """Make the checkpoint exist; on rank 0, once every share is on the disk."""
        files = {name: entry for part in parts for name, entry in part.items()}
        manifest = self._plan.manifest(self.target.step, self._state, files)
        self.error = attempt(lambda: self._commit(manifest))
        self.committed = self.error is None

    def _commit(self, manifest: Any) -> None:
        for rank in range(self._world_size):
            self._marker(rank).unlink(missing_ok=True)
        commit(manifest, self.target)

    def _run(self) -> None:
        try:
            self._write()
            if self.error is None and self._world_size > 1:
                # A disk too full for the marker is no failure: `finish` does without it.
                with suppress(OSError):
                    self._write_marker()
        except Exception as failure:  # whatever it is, the training thread must hear of it
            self.error = f"{type(failure).__name__}: {failure}"
        finally:
            self._share.clear()
            self.written.set()
        if self.rank == 0 and self.error is None:
            self._commit_when_all_have_written()

    def _write(self) -> None:
        """Write, hash and flush this rank's files, freeing each tensor as it is written."""
        writer: TensorWriter | None = None
        try:
            for file, tensors in self._share.items():
                shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
                writer = TensorWriter(self.target.partial / file, shapes)
                for name in shapes:
                    writer.append(name, tensors.pop(name))
                self.entries[file] = writer.close()
                writer = None
        except OSError as failure:
            self.error = explain(failure)
            if writer is not None:
                writer.abandon()

    def _write_marker(self) -> None:
        marker = self._marker(self.rank)
        partial = marker.with_suffix(".part")
        partial.write_text(json.dumps({n: asdict(entry) for n, entry in self.entries.items()}))
        os.rename(partial, marker)

    def _marker(self, rank: int) -> Path:
        """Marker of a rank: its share is on the disk; holds the hashes."""
        return self.target.partial / f"rank-{rank:05d}.json"

    def _commit_when_all_have_written(self) -> None:
        parts = {0: self.entries}
        while len(parts) < self._world_size:
            for rank in range(self._world_size):
                if rank not in parts and self._marker(rank).exists():
                    made = json.loads(self._marker(rank).read_text())
                    parts[rank] = {name: FileEntry(**entry) for name, entry in made.items()}
            if len(parts) < self._world_size and self._stop.wait(POLL_SECONDS):
                return
        self.commit([parts[rank] for rank in range(self._world_size)])


def _snapshot(engine: Engine, plan: SavePlan) -> dict[str, dict[str, Tensor]]:
    """Host copies of the tensors that this rank writes, by file; gathers all with all ranks."""
    owned: dict[str, dict[str, Tensor]] = {file: {} for file in plan.share(engine.topology.rank)}
    for name, kind in plan.order:
        tensor = engine.read(name, kind)
        file = plan.tensors[key(name, kind)]
        if file in owned:
            owned[file][key(name, kind)] = tensor.to("cpu", copy=True)
    return owned
