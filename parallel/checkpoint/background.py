"""Saving while training goes on: the step pays for a copy, a thread for writing and hashing.

`save` gathers every tensor as a blocking save does, but each rank only keeps its share in host
memory and returns; a thread of each rank then writes, hashes and syncs it. That thread calls no
collective: those of the training thread would have to come in the same order on every rank, and on
NCCL would block the step. Instead each rank leaves a mark beside its files when they are safe on
the disk, which all ranks see anyway, and rank 0's thread commits when all marks are there. The
training threads meet again in `finish`, where the marks no longer matter: what each rank wrote
travels by a collective, so that a file system that shows marks late, or a rank whose full disk took
no mark, costs time and nothing else. Killed at any moment, the hidden folder is no checkpoint.
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

LOOK_SECONDS = 0.2
"""How often rank 0's thread looks for the marks of the others."""


class BackgroundSaver:
    """Writes one checkpoint at a time behind the training loop's back."""

    def __init__(self) -> None:
        self._flight: _Flight | None = None

    def save(
        self, engine: Engine, folder: Path, step: int, state: dict[str, Any], keep: int = 0
    ) -> None:
        """Begin what `save_checkpoint` does, and return once this rank's share is copied.

        Collective. Finish the save before first. Raises SaveError on every rank when the folder
        cannot be made; whatever goes wrong later is raised by `finish`.
        """
        assert self._flight is None, "finish the checkpoint in flight first"
        target = Target(folder, step, keep)
        save.start(target, engine.topology.rank)
        plan = SavePlan(engine)
        self._flight = _Flight(
            target, plan, copy.deepcopy(state), _snapshot(engine, plan), engine.topology.rank
        )

    def committed(self) -> Path | None:
        """The checkpoint that has come to exist since the last call; known on rank 0 only."""
        if self._flight is None or not self._flight.committed or self._flight.told:
            return None
        self._flight.told = True
        return self._flight.target.final

    def finish(self) -> Path | None:
        """Wait for the checkpoint in flight, if there is one; collective.

        Its path, unless `committed` has told it already. Raises SaveError on every rank when it
        could not be written.
        """
        flight, self._flight = self._flight, None
        if flight is None:
            return None
        flight.stop()
        save.agree(flight.error, flight.target, flight.rank)
        # All shares are on the disk. Rank 0's thread may not have seen that.
        collected: list[dict[str, FileEntry]] = [{}] * dist.get_world_size()
        dist.all_gather_object(collected, flight.entries)
        if flight.rank == 0 and not flight.committed:
            flight.commit(collected)
        save.agree(flight.error, flight.target, flight.rank)
        return None if flight.told else flight.target.final

    def close(self, seconds: float = 60.0) -> None:
        """Give a checkpoint in flight so long, without the other ranks; for a run that failed."""
        if self._flight is not None:
            self._flight.thread.join(seconds)
            self._flight = None


class _Flight:
    """One checkpoint on its way from memory to the disk, on one rank."""

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
        """Set once this rank's share is on the disk or has failed."""
        self.committed = False
        self.told = False
        self._plan, self._state, self._share = plan, state, share
        self._world_size = dist.get_world_size()
        self._stop = threading.Event()
        # A daemon: a run that dies does not wait for its last, unfinished checkpoint.
        self.thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        self.thread.start()

    def stop(self) -> None:
        """Wait until this rank's share is written; its thread looks for no more marks."""
        self.written.wait()
        self._stop.set()
        self.thread.join()

    def commit(self, parts: list[dict[str, FileEntry]]) -> None:
        """Rank 0, when every share is on the disk: make the checkpoint exist."""
        files = {name: entry for part in parts for name, entry in part.items()}
        manifest = self._plan.manifest(self.target.step, self._state, files)
        self.error = attempt(lambda: self._commit(manifest))
        self.committed = self.error is None

    def _commit(self, manifest: Any) -> None:
        for rank in range(self._world_size):
            self._mark(rank).unlink(missing_ok=True)
        commit(manifest, self.target)

    def _run(self) -> None:
        try:
            self._write()
            if self.error is None and self._world_size > 1:
                # A disk too full for the mark is no failure: `finish` does without it.
                with suppress(OSError):
                    self._leave_mark()
        except Exception as failure:  # whatever it is, the training thread must hear of it
            self.error = f"{type(failure).__name__}: {failure}"
        finally:
            self._share.clear()
            self.written.set()
        if self.rank == 0 and self.error is None:
            self._commit_when_all_have_written()

    def _write(self) -> None:
        """Write, hash and sync this rank's files, freeing each tensor as it is written."""
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

    def _leave_mark(self) -> None:
        mark = self._mark(self.rank)
        partial = mark.with_suffix(".part")
        partial.write_text(json.dumps({n: asdict(entry) for n, entry in self.entries.items()}))
        os.rename(partial, mark)

    def _mark(self, rank: int) -> Path:
        """File that says that this rank's share is safe, and its hashes."""
        return self.target.partial / f"rank-{rank:05d}.json"

    def _commit_when_all_have_written(self) -> None:
        parts = {0: self.entries}
        while len(parts) < self._world_size:
            for rank in range(self._world_size):
                if rank not in parts and self._mark(rank).exists():
                    made = json.loads(self._mark(rank).read_text())
                    parts[rank] = {name: FileEntry(**entry) for name, entry in made.items()}
            if len(parts) < self._world_size and self._stop.wait(LOOK_SECONDS):
                return
        self.commit([parts[rank] for rank in range(self._world_size)])


def _snapshot(engine: Engine, plan: SavePlan) -> dict[str, dict[str, Tensor]]:
    """Gather every tensor with all ranks; host copies of those that this rank writes, by file."""
    owned: dict[str, dict[str, Tensor]] = {file: {} for file in plan.share(engine.topology.rank)}
    for name, kind in plan.order:
        tensor = engine.read(name, kind)
        file = plan.tensors[key(name, kind)]
        if file in owned:
            owned[file][key(name, kind)] = tensor.to("cpu", copy=True)
    return owned
