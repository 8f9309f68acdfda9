"""Comparison of a run that was begun with what its study says by now."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cluster.status import read_status
from pretrain.config.compose import flatten, load_config
from pretrain.config.preflight import has_checkpoint
from pretrain.config.run import Config
from pretrain.errors import ConfigError

_FREE = (
    "run.name", "run.root", "run.dir", "run.device", "run.branch_sha256",
    "data.train", "data.validation",
    "data.tokenizer", "data.verify", "data.cache", "data.cache_bytes", "model.attention",
    "parallel.", "tracking.", "train.log_interval", "train.checkpoint_interval",
    "train.async_checkpoint", "train.keep_checkpoints", "train.keep_best",
)  # fmt: skip
"""Keys and prefixes of keys without influence on a table. Preflight compares the content of pools
that have moved."""


def check_unchanged(config: Config) -> None:
    """Raise ConfigError where the folder holds a run of another configuration.

    A run that has neither ended nor a checkpoint begins anew and may be any other.
    """
    run = config.run.path
    saved = run / "config.yaml"
    if is_fresh(run) or not saved.exists():
        return
    before, after = flatten(load_config(saved)), flatten(config)
    if after.get("objective.time_window") is None:  # the first start fills it in
        after["objective.time_window"] = before.get("objective.time_window")
    lines = [
        f"{key}: the run has {_shown(before, key)}, given {_shown(after, key)}"
        for key in sorted({*before, *after})
        if before.get(key) != after.get(key) and not key.startswith(_FREE)
    ]
    if lines:
        raise ConfigError(
            "the run was begun with another configuration:\n  "
            + "\n  ".join(lines)
            + "\nset these back, remove the folder of the run, or choose another one for the study "
            "(--dir; run.name with --multirun)"
        )


def is_fresh(run: Path) -> bool:
    """True where nothing would be lost if the run began again."""
    status = read_status(run)
    finished = status is not None and status["state"] == "finished"
    return not finished and not has_checkpoint(run)


def _shown(values: dict[str, Any], key: str) -> str:
    return repr(values[key]) if key in values else "none"
