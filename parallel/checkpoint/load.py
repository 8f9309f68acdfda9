"""Loading: find the newest complete checkpoint, check its hashes, and fill every rank's tensors.

Nothing here depends on the layout that wrote the checkpoint. Each rank reads only its
tensor-parallel slices, straight from the files.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch.distributed as dist
from torch import Tensor, nn

from parallel.checkpoint.manifest import (
    AVERAGES,
    WEIGHTS,
    Manifest,
    kind_of,
    read_manifest,
    verify_files,
)
from parallel.checkpoint.plan import key
from parallel.engine.base import Engine
from parallel.engine.optimizer import EMA, WEIGHT, Kind
from parallel.errors import CheckpointError
from parallel.layers import own_shape, partition_dim, whole_shape
from parallel.layout.topology import Topology

log = logging.getLogger(__name__)


def complete_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints in `folder`, newest first.

    Incomplete and truncated ones are passed over with a warning that gives the reason.
    """
    complete = []
    for path in sorted(folder.glob("step-*"), reverse=True):
        try:
            read_manifest(path)
        except CheckpointError as error:
            log.warning("%s; passed over", error)
            continue
        complete.append(path)
    return complete


def latest_checkpoint(folder: Path) -> Path | None:
    """Newest complete checkpoint in `folder`; None when there is none."""
    return next(iter(complete_checkpoints(folder)), None)


def load_latest(
    engine: Engine, folder: Path, check_state: Callable[[dict[str, Any]], object] = bool
) -> tuple[Path, dict[str, Any]] | None:
    """Load the newest undamaged checkpoint; its path and state, or None. Collective.

    A checkpoint is passed over with a warning where its content differs from its manifest, or where
    `check_state` raises ValueError for its state. Raises CheckpointError where none is left.
    """
    found: list[list[str]] = [[]]
    if engine.topology.rank == 0:
        found = [[str(path) for path in complete_checkpoints(folder)]]
    dist.broadcast_object_list(found, src=0)
    for name in found[0]:
        path = Path(name)
        try:
            _verify_together(path, check_state)
        except CheckpointError as error:
            _warn(engine.topology.rank, f"{error}; trying the one before it")
            continue
        return path, _restore(engine, path)
    if found[0]:
        raise CheckpointError(
            f"none of the {len(found[0])} checkpoints in {folder} can be loaded; restore one of "
            "them, or remove the folder to begin again"
        )
    return None


def load_checkpoint(
    engine: Engine, path: Path, check_state: Callable[[dict[str, Any]], object] = bool
) -> dict[str, Any]:
    """Restore weights and optimizer state from this checkpoint and return its state. Collective.

    Raises CheckpointError, on every rank, when it is damaged, or of another model or optimizer, or
    when `check_state` raises ValueError for its state.
    """
    _verify_together(path, check_state)
    return _restore(engine, path)


def load_weights(path: Path, kind: Literal["weight", "ema"] = "weight") -> dict[str, Tensor]:
    """Whole float32 weights by canonical name, hash checked; needs no process group.

    Raises CheckpointError when the file is damaged, or holds no averaged weights where `kind` asks
    for them.
    """
    from safetensors.torch import load_file

    manifest = read_manifest(path)
    if kind == EMA and not manifest.has_ema:
        raise CheckpointError(
            f"{path} holds no averaged weights: its run had train.ema_decay 0. Take the raw weights"
        )
    file = WEIGHTS if kind == WEIGHT else AVERAGES
    verify_files(path, manifest, [file])
    loaded = load_file(path / file)
    return {name: loaded[key(name, kind)] for name in manifest.shapes}


def assign_weights(module: nn.Module, weights: Mapping[str, Tensor], topology: Topology) -> None:
    """Copy whole weights into a module that no engine holds, each rank its slice.

    Raises CheckpointError when names or shapes differ.
    """
    parameters = dict(module.named_parameters())
    tp = topology.tensor_parallel_size
    _check_same_model(
        {name: whole_shape(parameter, tp) for name, parameter in parameters.items()},
        {name: list(w.shape) for name, w in weights.items()},
        "the weights",
    )
    for name, parameter in parameters.items():
        parameter.data.copy_(weights[name][own_index(parameter, topology)])


def _warn(rank: int, text: str) -> None:
    if rank == 0:
        log.warning("%s", text)


def _verify_together(path: Path, check_state: Callable[[dict[str, Any]], object] = bool) -> None:
    """Compare all hashes, every rank a share of the files; all ranks raise if one finds damage."""
    rank, world = dist.get_rank(), dist.get_world_size()
    error: str | None = None
    try:
        manifest = read_manifest(path)
        check_state(manifest.state)
        verify_files(path, manifest, sorted(manifest.files)[rank::world])
    except ValueError as failure:
        error = f"checkpoint {path} is damaged: state in its manifest: {failure}"
    except (CheckpointError, OSError) as failure:
        error = str(failure)
    errors: list[str | None] = [None] * world
    dist.all_gather_object(errors, error)
    for text in errors:
        if text is not None:
            raise CheckpointError(text)


def _restore(engine: Engine, path: Path) -> dict[str, Any]:
    """Copy verified tensors into the engine."""
    from safetensors import safe_open

    manifest = read_manifest(path)
    _check_same_model(engine.shapes, manifest.shapes, str(path))
    if manifest.optimizer_step > 0:
        _check_same_optimizer(engine, manifest, path)
    engine.optimizer_step = manifest.optimizer_step
    if manifest.step > 0 and manifest.optimizer_step == 0:
        _warn(engine.topology.rank, f"{path} holds no optimizer state: the optimizer begins afresh")
    kinds = {name: [WEIGHT, *engine.kinds_of(name)] for name in engine.parameters}
    if engine.average is not None and not manifest.has_ema:
        _warn(engine.topology.rank, f"{path} holds no averaged weights: the average begins here")
        kinds = {name: [kind for kind in all_ if kind != EMA] for name, all_ in kinds.items()}
    by_file: dict[str, list[tuple[str, Kind]]] = {}
    for name in engine.parameters:
        for kind in kinds[name]:
            by_file.setdefault(manifest.tensors[key(name, kind)], []).append((name, kind))
    for file, tensors in by_file.items():
        with safe_open(path / file, framework="pt") as opened:
            for name, kind in tensors:
                index = own_index(engine.parameters[name], engine.topology)
                engine.write(name, kind, opened.get_slice(key(name, kind))[index])
    if engine.average is not None and not manifest.has_ema:
        engine.average.restart()
    return manifest.state


def own_index(parameter: nn.Parameter, topology: Topology) -> tuple[slice, ...]:
    """Index of this tensor-parallel rank's slice in the whole tensor."""
    shape = own_shape(parameter)
    index = [slice(0, size) for size in shape]
    dim = partition_dim(parameter)
    if dim is not None:
        size = shape[dim]
        index[dim] = slice(topology.tp_rank * size, (topology.tp_rank + 1) * size)
    return tuple(index)


def _check_same_optimizer(engine: Engine, manifest: Manifest, path: Path) -> None:
    """Raise CheckpointError unless the checkpoint holds the state that the optimizer keeps."""
    spec, kinds = engine.config.optimizer, manifest.optimizer_state
    wanted = {
        key(name, kind)
        for name, shape in engine.shapes.items()
        for kind in spec.group(name, shape).names
    }
    found = {name for name in manifest.tensors if kind_of(name) in kinds}
    if found == wanted:
        return
    holds, keeps = ", ".join(sorted(kinds)) or "no state", ", ".join(spec.names) or "none"
    other = sorted(wanted ^ found)[0] if kinds == set(spec.names) else ""
    raise CheckpointError(
        f"{path} was written by another optimizer: it holds {holds}, {spec.name} keeps {keeps}"
        f"{f' of other parameters (one has {other})' if other else ''}. Use the optimizer "
        "it was written with, or start another run from its weights (epochal export, run.init_from)"
    )


def _check_same_model(
    wanted: Mapping[str, list[int]], found: Mapping[str, list[int]], source: str
) -> None:
    """Raise CheckpointError unless names and whole shapes agree."""
    missing = sorted(set(wanted) - set(found))
    extra = sorted(set(found) - set(wanted))
    if missing or extra:
        raise CheckpointError(
            f"{source} belongs to another model: it lacks {missing[:3] or 'nothing'} and has "
            f"{extra[:3] or 'nothing'} besides. Use the configuration it was written with"
        )
    for name, shape in wanted.items():
        if shape != found[name]:
            raise CheckpointError(
                f"{source} belongs to another model: {name} has shape {found[name]}, this "
                f"configuration has {shape}. Use the configuration it was written with"
            )
