"""The state with which a training begins: its last checkpoint, another run's, or fresh weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from data_pipeline.errors import CursorError
from data_pipeline.stream.cursor import Cursor
from parallel.checkpoint import load_checkpoint, load_file_weights, load_latest, manifest_hash
from parallel.errors import CheckpointError
from pretrain.training.learning_rate import resumed_warmup
from pretrain.training.state import Origin, TrainState

if TYPE_CHECKING:
    from pretrain.training.session import Session


def begin(session: Session) -> None:
    """Restore the newest checkpoint of the run; a run without one begins as `run.*` says.

    Collective. Raises CheckpointError and CursorError.
    """
    run = session.config.run
    loaded = load_latest(
        session.engine, session.checkpoints, lambda saved: check_saved(session, saved)
    )
    if loaded is not None:
        session.resumed_from, saved = loaded
        _adopt(session, saved)
        session.origin = Origin.from_dict(saved["origin"]) if "origin" in saved else None
    elif run.branch_from is not None:
        _branch(session, run.branch_from, run.branch_sha256)
    elif run.init_from is not None:
        load_file_weights(session.engine, run.init_from)


def check_saved(session: Session, saved: dict[str, Any]) -> None:
    """Restore the objective; ValueError unless `saved` is a state that a session has saved."""
    try:
        cursor = Cursor.from_dict(saved.get("cursor"))
        session.objective.restore(saved.get("objective", {}))
    except CursorError as error:
        raise ValueError(f"cursor: {error}") from None
    except (KeyError, TypeError, AttributeError, AssertionError) as error:
        raise ValueError(f"objective: {error!r}") from None
    if TrainState.from_dict(saved.get("train")).position != cursor.position:
        raise ValueError("train.position and cursor.position differ")
    if "origin" in saved:
        Origin.from_dict(saved["origin"])


def _adopt(session: Session, saved: dict[str, Any]) -> None:
    """Take over what a checkpoint holds besides tensors."""
    stream = session.train_stream
    Cursor.from_dict(saved["cursor"]).check(stream)
    session.state = TrainState.from_dict(saved["train"])
    session.warmup = resumed_warmup(saved, session.config, stream.sequences_per_epoch)
    session.objective.restore(saved.get("objective", {}))


def _branch(session: Session, path: Path, identity: str | None) -> None:
    """Restore the checkpoint of another run that `pretrain.config.branch` has chosen.

    Where each rank has chosen for itself (started by hand, from a run that still goes on), that of
    rank 0 counts.
    """
    chosen = [(str(path), identity)]
    dist.broadcast_object_list(chosen, src=0)
    path, identity = Path(chosen[0][0]), chosen[0][1]
    saved = load_checkpoint(session.engine, path, lambda saved: check_saved(session, saved))
    found = manifest_hash(path)
    if identity is not None and found != identity:
        raise CheckpointError(
            f"run.branch_from {path} has changed since this start: its manifest has the hash "
            f"{found[:16]}..., it was {identity[:16]}...; start again"
        )
    _adopt(session, saved)
    state = session.state
    state.forget_evaluations()
    session.origin = Origin(str(path), state.step, state.position, found)
