"""Hooks after a step: log, evaluate, save, stop. The loop only calls them in order.

Each hook decides from the state alone whether it is due, so that all ranks agree without a message
(only a signal needs a collective, in `cluster.rank.preemption`).
"""

from __future__ import annotations

import time
from pathlib import Path

import torch

from cluster.rank.preemption import Preemption
from parallel.engine.base import StepResult
from parallel.errors import SaveError
from pretrain.errors import TrainingError
from pretrain.evaluation.likelihood import InterruptedEvaluation
from pretrain.tracking import Tracking
from pretrain.training.session import Session
from pretrain.training.stopping import EarlyStopping

PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
"""Dense bfloat16 operations per second by device name, for MFU."""


class Hooks:
    """Logging, evaluation, checkpoints and the stop of one running training."""

    def __init__(self, session: Session, tracking: Tracking, preemption: Preemption) -> None:
        self.session, self.tracking, self.preemption = session, tracking, preemption
        self.early = EarlyStopping(session, tracking)
        self.signal: str | None = None
        self._logged_position = session.state.position
        self._logged_tokens = session.state.tokens
        self._clock = time.perf_counter()
        self._stop_position = session.stop_position
        self._eval_positions = self._evaluations()

    def before_first_step(self) -> None:
        """Make an evaluation that a signal postponed; training may depend on its result."""
        state = self.session.state
        if not state.evaluation_due:
            return
        state.evaluation_due = not self.evaluate()
        if self.should_stop():
            self.save(required=True)

    def after_step(self, result: StepResult, lr: float) -> None:
        """Do everything that is due at the current state."""
        self._report_saved(self.session.saver.committed())
        state, train = self.session.state, self.session.config.train
        self.signal = self.preemption.requested()
        stopping = self.should_stop()
        saving = stopping or _due(state.step, train.checkpoint_interval)
        saving = saving or self.session.is_kept_place
        logged = saving or _due(state.step, train.log_interval)
        if logged:
            self._log(result, lr)
        due = self._evaluation_due() or self.complete
        # A preempted run has seconds: an evaluation of this step is left to the next start.
        state.evaluation_due = due and (self.signal is not None or not self.evaluate())
        stopping = self.should_stop()
        if stopping and not logged:  # the evaluation was interrupted, or ends the run
            self._log(result, lr)
        if saving or stopping:
            self.save(required=stopping)

    def should_stop(self) -> bool:
        """True where the run is complete, its evaluations end it, or a signal asks it to stop."""
        return self.signal is not None or self.complete or self.early.met

    @property
    def complete(self) -> bool:
        """True where the run has come to its last position."""
        return self.session.state.position >= self._stop_position

    def evaluate(self) -> bool:
        """Measure the validation bound and log it; False where a signal came in the middle."""
        started = time.perf_counter()
        state = self.session.state
        metrics = {
            "train/epoch": self.session.train_stream.epoch_of(state.position),
            "train/tokens": float(state.tokens),
            "train/flops": state.flops,
        }
        try:
            found = self.session.evaluate(self._interrupted)
            self.session.adapt(self._interrupted)
        except InterruptedEvaluation:
            return False
        for prefix, likelihood in found.items():
            metrics |= likelihood.metrics(prefix)
        self.tracking.log(metrics, state.step)
        self.early.note(found["validation"])
        self._clock += time.perf_counter() - started  # speed is that of training
        return True

    def _interrupted(self) -> bool:
        """Ask the ranks for a signal; collective."""
        self.signal = self.preemption.requested()
        return self.signal is not None

    def save(self, *, required: bool) -> None:
        """Write a checkpoint, in the background unless it is required or the run forbids that.

        The outcome of a background checkpoint is reported after a later step, or when the next one
        begins; if it fails, training goes on. A `required` one is waited for and raises SaveError.
        """
        started = time.perf_counter()
        try:
            self._report_saved(self.session.saver.finish())
        except SaveError as error:
            self._warn(error)
        try:
            if required or not self.session.config.train.async_checkpoint:
                self._report_saved(self.session.save())
            else:
                self.session.save_in_background()
        except SaveError as error:
            if required:
                raise
            self._warn(error)
        self._clock += time.perf_counter() - started

    def _report_saved(self, path: Path | None) -> None:
        if path is not None:
            self.tracking.message(f"saved {path}")

    def _warn(self, error: SaveError) -> None:
        self.tracking.message(f"warning: {error}; training goes on without this checkpoint")

    def _log(self, result: StepResult, lr: float) -> None:
        state, now = self.session.state, time.perf_counter()
        tokens = state.tokens - self._logged_tokens
        speed = tokens / max(now - self._clock, 1e-9)
        metrics = {
            "train/loss": result.loss.item(),
            "train/grad_norm": result.grad_norm.item(),
            "train/lr": lr,
            "train/epoch": self.session.train_stream.epoch_of(state.position),
            "train/tokens": float(state.tokens),
            "train/flops": state.flops,
            "train/tokens_per_second": speed,
            "position_start": float(self._logged_position),
            "position_stop": float(state.position),
        }
        peak = _peak_flops()
        if peak is not None:
            world = self.session.topology.world_size
            metrics["train/mfu"] = speed * self.session.flops_per_token / (peak * world)
        self.tracking.log(metrics, state.step)
        self._logged_position, self._logged_tokens, self._clock = state.position, state.tokens, now

    def _evaluations(self) -> list[int]:
        """Positions of the evaluations at given epochs that are still to come."""
        per_epoch = self.session.train_stream.sequences_per_epoch
        positions = [round(e * per_epoch) for e in self.session.config.train.eval_epochs]
        return sorted(p for p in positions if p > self.session.state.position)

    def _evaluation_due(self) -> bool:
        state = self.session.state
        passed = False
        while self._eval_positions and self._eval_positions[0] <= state.position:
            self._eval_positions.pop(0)
            passed = True
        return passed or _due(state.step, self.session.config.train.eval_interval)


def check_applied(result: StepResult, step: int) -> None:
    """Raise TrainingError where the gradient was not finite; such a step changed nothing."""
    if not result.applied:
        raise TrainingError(
            f"step {step + 1}: loss {result.loss.item():g}, gradient norm "
            f"{result.grad_norm.item():g}; the update was not applied. The weights before it "
            "are saved as the newest checkpoint; lower optimizer.lr, or look at the data of this "
            "step with `epochal data inspect`"
        )


def _due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0


def _peak_flops() -> float | None:
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    return next((flops for device, flops in PEAK_FLOPS.items() if device in name), None)
