"""The first start of a branch: a run that begins with the whole state of another run's checkpoint.

A branch differs from its origin by what a resumed run may change, and goes on in a folder of its
own. Everything is checked here against the manifest of the checkpoint; the ranks compare hashes,
shapes and the data stream when they load it. A later start resumes the branch's own checkpoints and
never comes here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parallel.errors import CheckpointError
from pretrain.config.changes import compare, moved_data
from pretrain.config.compose import replace_values, validate
from pretrain.config.earlier import without_earlier
from pretrain.config.run import Config
from pretrain.config.secrets import without_secrets
from pretrain.errors import ConfigError
from pretrain.training.learning_rate import check_warmup, decay_start, resumed_warmup
from pretrain.training.state import TrainState

_OWN = ("init_from", "branch_from", "branch_sha256")
"""Keys of `run` that say how a run began: those of the origin and of the branch differ."""


@dataclass(frozen=True)
class _Checkpoint:
    """Checkpoint from which a run can branch off."""

    path: Path
    state: dict[str, Any]
    config: Config
    """Configuration of the run that saved it."""
    position: int


def begin_branch(config: Config, place: Path, sequences_per_epoch: int) -> Config:
    """Choose the checkpoint at `place`, and fill it in with the values of the run that saved it.

    Of a run it is the newest from which the branch equals a run of its own schedule. Raises
    ConfigError for anything that a resumed run may not change, CheckpointError for damage.
    """
    from parallel.checkpoint import manifest_hash

    found = _checkpoints(place)
    origin = found[0].config
    if config.objective.time_window is None:
        window = origin.objective.time_window
        config = replace_values(config, {"objective.time_window": window})
    _check_differences(config, origin, place)
    chosen = _choose(found, config, sequences_per_epoch, place)
    identity = manifest_hash(chosen.path)
    if config.run.branch_sha256 not in (None, identity):
        raise ConfigError(
            f"run.branch_sha256 is {config.run.branch_sha256}, but the manifest of {chosen.path} "
            f"has {identity}: it is another checkpoint than the one that was recorded; give that "
            "one, or set run.branch_sha256=null to take this one"
        )
    return replace_values(
        config, {"run.branch_from": str(chosen.path), "run.branch_sha256": identity}
    )


def _checkpoints(place: Path) -> list[_Checkpoint]:
    """The checkpoint at `place`, or those of the run there, newest first; at least one."""
    from parallel.checkpoint import complete_checkpoints
    from parallel.checkpoint.manifest import NAME

    paths = [place] if (place / NAME).exists() else complete_checkpoints(place / "checkpoints")
    if not paths:
        raise ConfigError(
            f"run.branch_from {place} is neither a checkpoint nor a run that holds one; give a run "
            "folder, or a folder step-... below its checkpoints"
        )
    return [_read(path) for path in paths]


def _read(path: Path) -> _Checkpoint:
    from parallel.checkpoint import read_manifest

    manifest = read_manifest(path)
    if manifest.step > 0 and manifest.optimizer_step == 0:
        raise ConfigError(
            f"run.branch_from {path} holds no optimizer state; give a checkpoint of the run "
            "itself, or start from its weights alone (epochal export, run.init_from)"
        )
    state = manifest.state
    try:
        flat = state.get("config")
        if not isinstance(flat, Mapping):
            raise ValueError("config: it is missing")
        position = TrainState.from_dict(state.get("train")).position
    except ValueError as error:
        raise CheckpointError(
            f"checkpoint {path} is damaged: state in its manifest: {error}"
        ) from None
    try:
        config = validate(without_earlier(_nested(without_secrets(flat))))
    except ConfigError as error:
        raise ConfigError(
            f"the configuration in run.branch_from {path} does not fit this version:\n{error}\n"
            "use the version that wrote it"
        ) from None
    return _Checkpoint(path, state, config, position)


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Tree of which `flatten` has made dotted keys."""
    tree: dict[str, Any] = {}
    for dotted, value in flat.items():
        *sections, leaf = dotted.split(".")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
        node[leaf] = value
    return tree


def _check_differences(config: Config, origin: Config, place: Path) -> None:
    """Raise ConfigError, with both values, for each key that a resumed run could not change."""
    own = {key: getattr(config.run, key) for key in _OWN}
    compared = origin.model_copy(update={"run": origin.run.model_copy(update=own)})
    differences = compare(compared, config) + moved_data(compared, config)
    if differences:
        raise ConfigError(
            f"run.branch_from {place} holds checkpoints of another configuration:\n  "
            + "\n  ".join(differences)
            + "\na branch changes what a resumed run may change; set these back, or start a run "
            "without run.branch_from"
        )


def _choose(
    found: list[_Checkpoint], config: Config, sequences_per_epoch: int, place: Path
) -> _Checkpoint:
    """Newest checkpoint before the branch's end and, with `wsd`, not after its decay's start."""
    from data_pipeline.stream.budget import total_positions

    schedule, epochs = config.optimizer.schedule, config.data.epochs
    total = total_positions(sequences_per_epoch, epochs)
    if schedule.warmup != found[0].config.optimizer.schedule.warmup:
        check_warmup(schedule, total_positions=total, batch_size=config.train.global_batch_size)
    limit, where = float(total - 1), f"the run ends at position {total:,}"
    warmup = resumed_warmup(found[0].state, config, sequences_per_epoch)
    if schedule.name == "wsd":
        limit = decay_start(schedule, total_positions=total, warmup=warmup)
        where = (
            f"the decay (optimizer.schedule.decay {schedule.decay:g}) starts at position "
            f"{limit:,.0f}, epoch {limit / sequences_per_epoch:.4g}"
        )
    for checkpoint in found:
        if checkpoint.position <= limit:
            return checkpoint
    first = found[-1].position
    which = "the earliest checkpoint" if len(found) > 1 else "the checkpoint"
    raise ConfigError(
        f"run.branch_from {place}: with data.epochs {epochs:g} {where}, but {which} there is at "
        f"position {first:,}, epoch {first / sequences_per_epoch:.4g}; raise data.epochs, or "
        "branch from an earlier checkpoint (train.checkpoint_epochs lets a run keep one)"
    )
