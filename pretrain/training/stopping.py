"""The end of a run whose validation loss no longer improves, and the checkpoint of its best one.

Everything that decides is in the train state, so that an interrupted run ends where an
uninterrupted one does. Rank 0's loss counts on every rank: the others' may differ in the last bit.
"""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path

import torch.distributed as dist

from parallel.checkpoint import save_checkpoint
from parallel.errors import SaveError
from pretrain.evaluation.likelihood import Likelihood
from pretrain.tracking import Tracking
from pretrain.training.session import Session

BEST = "best"
"""Folder in a run folder with the checkpoint of the lowest evaluation."""


class EarlyStopping:
    """Rule of `train.patience`, and `train.keep_best`."""

    def __init__(self, session: Session, tracking: Tracking) -> None:
        self._session, self._tracking = session, tracking

    @property
    def met(self) -> bool:
        """True where the run ends because of its evaluations."""
        patience = self._session.config.train.patience
        return 0 < patience <= self._session.state.evaluations_without_improvement

    @property
    def reason(self) -> str:
        """Sentence that names the rule."""
        state, patience = self._session.state, self._session.config.train.patience
        return (
            f"train.patience: {patience} evaluations without improvement, "
            f"lowest {state.lowest_loss:.4f} at step {state.lowest_step:,}"
        )

    def note(self, likelihood: Likelihood) -> None:
        """Count an evaluation, and keep its checkpoint where it is the best; collective."""
        session = self._session
        loss = [likelihood.nats_per_token]
        if session.topology.world_size > 1:
            dist.broadcast_object_list(loss, src=0)
        train = session.config.train
        if session.state.note_evaluation(loss[0], train.min_delta) and train.keep_best:
            self._keep()

    def _keep(self) -> None:
        """Write the checkpoint of this step, then remove that of an earlier evaluation."""
        session = self._session
        folder, step = session.config.run.path / BEST, session.state.step
        try:
            path = save_checkpoint(session.engine, folder, step, session.saved_state())
        except SaveError as error:
            self._tracking.message(f"warning: {error}; training goes on without this checkpoint")
            return
        if session.runtime.rank == 0:
            _remove_others(path)


def _remove_others(kept: Path) -> None:
    for other in kept.parent.glob("step-*"):
        if other != kept:
            aside = other.with_name(f".tmp-{other.name}-replaced")
            with suppress(OSError):
                os.rename(other, aside)
            shutil.rmtree(aside, ignore_errors=True)
