"""Contents of a checkpoint before it is written, and the rank that writes each tensor."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch

from parallel.checkpoint.manifest import (
    AVERAGES,
    FORMAT,
    TEACHER_WEIGHTS,
    WEIGHTS,
    FileEntry,
    Manifest,
)
from parallel.engine.base import Engine
from parallel.engine.optimizer import EMA, TEACHER, WEIGHT, Kind

COPIES: dict[Kind, str] = {EMA: AVERAGES, TEACHER: TEACHER_WEIGHTS}
"""Further weights of the whole model, each in a separate file."""


def key(name: str, kind: Kind) -> str:
    """Name of a tensor inside a checkpoint."""
    return name if kind == WEIGHT else f"{kind}/{name}"


class SavePlan:
    """Tensors, files and the ranks that write them; the same on every rank.

    Weights and copies are in a file each, the state of the optimizer is spread over the ranks.
    """

    def __init__(self, engine: Engine) -> None:
        self.shapes = engine.shapes
        self.optimizer_step = engine.optimizer_step
        self.layout = asdict(engine.topology.layout)
        self.zero_stage, self.precision = engine.config.zero_stage, engine.config.precision
        self.order: list[tuple[str, Kind]] = []
        """Every tensor, in the order in which all ranks gather them."""
        self.tensors: dict[str, str] = {}
        """File of each tensor, by key."""
        self.owner: dict[str, int] = {WEIGHTS: 0}
        """Rank that writes each file."""
        kinds = engine.kinds
        load = [0] * engine.topology.world_size
        sizes = {name: torch.Size(shape).numel() for name, shape in self.shapes.items()}
        load[0] = sum(sizes.values())
        copies = {kind: file for kind, file in COPIES.items() if kind in kinds}
        for file in copies.values():
            self.owner[file] = load.index(min(load))
            load[self.owner[file]] += sum(sizes.values())
        for name in self.shapes:
            self._add(name, WEIGHT, WEIGHTS)
            for kind, file in copies.items():
                self._add(name, kind, file)
            state = [kind for kind in engine.kinds_of(name) if kind not in COPIES]
            if not state:
                continue
            owner = load.index(min(load))
            load[owner] += len(state) * sizes[name]
            file = f"optimizer-{owner:05d}.safetensors"
            self.owner[file] = owner
            for kind in state:
                self._add(name, kind, file)

    def _add(self, name: str, kind: Kind, file: str) -> None:
        self.order.append((name, kind))
        self.tensors[key(name, kind)] = file

    def share(self, rank: int) -> dict[str, dict[str, list[int]]]:
        """Shapes of the tensors in each file that `rank` writes, in writing order."""
        files: dict[str, dict[str, list[int]]] = {}
        for name, kind in self.order:
            file = self.tensors[key(name, kind)]
            if self.owner[file] == rank:
                files.setdefault(file, {})[key(name, kind)] = self.shapes[name]
        return files

    def manifest(self, step: int, state: dict[str, Any], files: dict[str, FileEntry]) -> Manifest:
        """Manifest of the checkpoint once its files are written."""
        return Manifest(
            format=FORMAT,
            step=step,
            optimizer_step=self.optimizer_step,
            layout=self.layout,
            zero_stage=self.zero_stage,
            precision=self.precision,
            shapes=self.shapes,
            tensors=self.tensors,
            files=files,
            state=state,
        )
