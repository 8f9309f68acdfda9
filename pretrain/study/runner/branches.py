"""Runs of many lengths from one long run: a trunk at constant rate, and a decay for each length.

With the schedule `wsd` the rate is constant up to the last share of a run. So runs of different
lengths are the same run up to there, and one trunk serves all of them: it leaves a checkpoint
before the start of each decay, from which a branch of that length goes on. In the same layout each
branch equals the separate run bit for bit, as noise, order and dropout are functions of the
position. The warm-up must be the same number of steps for all, not a share of each length.

Everything here is arithmetic on configurations; nothing is started.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, field_validator

from data_pipeline.stream.budget import total_positions
from pretrain.config.optimizers import ScheduleConfig
from pretrain.config.types import OpenFraction, Section
from pretrain.errors import ConfigError
from pretrain.training.boundaries import last_boundary
from pretrain.training.learning_rate import decay_start, warmup_positions

TRUNK = "trunk"
"""Name of the trunk among the parts of one cell of a study."""


class Branches(Section):
    """`branches` of a study: lengths of the runs that replace the `data.epochs` of each cell."""

    epochs: tuple[Annotated[float, Field(gt=0, le=1e6)], ...] = Field(min_length=1)
    """Lengths of the runs in epochs."""
    decay: OpenFraction = 0.2
    """Share of each run in which the rate falls to `optimizer.min_lr`."""

    @field_validator("epochs")
    @classmethod
    def _are_different(cls, given: tuple[float, ...]) -> tuple[float, ...]:
        if len(set(given)) < len(given):
            raise ValueError(f"given {list(given)}, allowed: every length once")
        return tuple(sorted(given))


@dataclass(frozen=True)
class Part:
    """One training of a cell: its trunk or one of its branches."""

    name: str
    """`trunk`, or `e` and the epochs of a branch."""
    overrides: Mapping[str, Any]
    """Values that the configuration of the cell gets."""
    start: int
    """Sample position at which it begins; 0 where it needs no trunk."""
    stop: int
    """Sample position at which it ends."""
    origin_step: int | None = None
    """Step of the trunk's checkpoint from which it starts."""

    @property
    def is_trunk(self) -> bool:
        """True for the part that is no run of the study: the others start from it."""
        return self.name == TRUNK

    def origin(self, trunk: Path) -> Path | None:
        """Checkpoint in the run folder `trunk` that it starts from."""
        if self.origin_step is None:
            return None
        return trunk / "checkpoints" / f"step-{self.origin_step:08d}"

    def values(self, trunk: Path) -> dict[str, Any]:
        """Its overrides, with the checkpoint in the run folder `trunk` that it starts from."""
        origin = self.origin(trunk)
        branch = {} if origin is None else {"run.branch_from": str(origin)}
        return {**self.overrides, **branch}

    def is_ready(self, trunk: Path) -> bool:
        """True where the checkpoint that it starts from is complete, or it needs none."""
        origin = self.origin(trunk)
        return origin is None or is_complete(origin)


@dataclass(frozen=True)
class Parts:
    """The trainings that replace separate runs of the same lengths."""

    trunk: Part | None
    """None where no length is long enough to share a step."""
    branches: tuple[Part, ...]

    @property
    def all(self) -> tuple[Part, ...]:
        """Trunk and branches in an order in which they can run."""
        return (*([] if self.trunk is None else [self.trunk]), *self.branches)


def is_complete(checkpoint: Path) -> bool:
    """True where a checkpoint exists: its manifest is written last."""
    return (checkpoint / "manifest.json").is_file()


def split(branches: Branches, *, sequences_per_epoch: int, batch_size: int, warmup: float) -> Parts:
    """Divide runs of these lengths into a trunk and branches.

    `batch_size` is in sequences, `warmup` is `optimizer.schedule.warmup`. Raises ConfigError where
    that is a share of the run, or longer than a run.
    """
    totals = {e: total_positions(sequences_per_epoch, e) for e in branches.epochs}
    schedule = ScheduleConfig(name="wsd", warmup=warmup, decay=branches.decay)
    shortest = min(totals.values())
    _check_warmup(warmup, shortest, batch_size)
    length = warmup_positions(schedule, total_positions=shortest, batch_size=batch_size)
    starts = {
        epochs: last_boundary(
            min(decay_start(schedule, total_positions=total, warmup=length), total - 1), batch_size
        )
        for epochs, total in totals.items()
    }
    parts = tuple(
        Part(
            name=f"e{epochs:g}",
            overrides={
                "data.epochs": epochs,
                "optimizer.schedule.name": "wsd",
                "optimizer.schedule.decay": branches.decay,
                "train.patience": 0,
            },
            start=start,
            stop=totals[epochs],
            origin_step=start // batch_size if start else None,
        )
        for epochs, start in starts.items()
    )
    return Parts(_trunk(sorted({*starts.values()} - {0}), sequences_per_epoch), parts)


def _trunk(places: list[int], sequences_per_epoch: int) -> Part | None:
    """Trunk that ends at the last of these positions and keeps a checkpoint at each."""
    if not places:
        return None
    return Part(
        name=TRUNK,
        overrides={
            "data.epochs": places[-1] / sequences_per_epoch,
            "optimizer.schedule.name": "constant",
            "train.patience": 0,
            "train.checkpoint_epochs": [place / sequences_per_epoch for place in places],
        },
        start=0,
        stop=places[-1],
    )


def _check_warmup(warmup: float, positions: int, batch_size: int) -> None:
    """Raise ConfigError unless the warm-up is a number of steps that the shortest run has."""
    steps = -(-positions // batch_size)
    if 0 < warmup < 1:
        raise ConfigError(
            f"optimizer.schedule.warmup {warmup:g} is a share of the run, which differs between "
            "the lengths of `branches`; give a number of steps that is the same for all, e.g. "
            f"{max(1, round(warmup * steps))} (that share of the shortest)"
        )
    if warmup > steps:
        raise ConfigError(
            f"optimizer.schedule.warmup {warmup:g} steps is longer than the shortest of "
            f"`branches`, {steps:,} steps; lower it, or leave out that length"
        )
