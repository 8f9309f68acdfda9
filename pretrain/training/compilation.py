"""Choice to compile layers and loss: the setting, and the obstacles to it.

A compiled layer pays off only where the layer gets the same shapes and constants in every batch;
elsewhere it would be compiled again for each batch. A loss is the same formula in every batch. This
module does not import torch, as the configuration does not.
"""

from __future__ import annotations

import os
import shutil
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pretrain.batch import AttentionKind
    from pretrain.config.run import Config


@dataclass(frozen=True)
class Compilation:
    """Decision to compile layers, with its description for the log."""

    on: bool
    description: str


def choose_compilation(config: Config, device: str, kinds: Iterable[AttentionKind]) -> Compilation:
    """Resolve `train.compile` for a device (`cpu` or `cuda`) and these attention rules."""
    if config.train.compile is True:
        return Compilation(True, "on")
    if config.train.compile is False:
        return Compilation(False, "off")
    obstacle = _preference(config, device, kinds) or conflict(config) or missing_compiler()
    return Compilation(False, f"off: {obstacle}") if obstacle else Compilation(True, "on")


def conflict(config: Config) -> str | None:
    """Setting with which layers cannot be compiled, and its allowed values; None without one."""
    p, m = config.parallel, config.model
    if p.zero_stage == 3:
        # Its hooks gather parameters when a module is called; a compiled layer calls no module.
        return "parallel.zero_stage is 3, allowed are 0, 1 and 2"
    if p.context_parallel_size > 1:
        return f"parallel.context_parallel_size is {p.context_parallel_size}, allowed is 1"
    for name in ("dropout", "attention_dropout"):
        if getattr(m, name) > 0:
            # Each layer and micro-batch has another seed, which would be a constant of the graph.
            return f"model.{name} is {getattr(m, name)}, allowed is 0"
    if config.data.documents == "masked":
        return "data.documents is masked (bounds vary from batch to batch), allowed is packed"
    return None


def loss_conflict(config: Config) -> str | None:
    """Setting with which the loss cannot be compiled, and its allowed values; None without one."""
    ranks = config.parallel.tensor_parallel_size
    if ranks > 1:  # the formula contains sums over ranks
        return f"parallel.tensor_parallel_size is {ranks}, allowed is 1"
    if not config.objective.scores_in_chunks:
        return (
            f"objective is {config.objective.name}, which scores the vocabulary in a separate pass"
        )
    return None


def missing_compiler() -> str | None:
    """Requirement of torch.compile that this machine lacks, with its remedy, or None."""
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        return f"there is no C++ compiler ({compiler}); install g++ or name one in CXX"
    if not Path(sysconfig.get_paths()["include"], "Python.h").is_file():
        return "Python's headers are missing (Python.h); install python3-dev"
    return None


def _preference(config: Config, device: str, kinds: Iterable[AttentionKind]) -> str | None:
    """Reason why `auto` does not compile layers that could be compiled, or None."""
    if device != "cuda":
        return "the kernels for the CPU are written by hand"
    if config.train.precision != "bfloat16":
        return "train.precision is float32"
    if config.parallel.tensor_parallel_size > 1:
        return "tensor parallelism splits layers into small graphs"
    if not {"causal", "bidirectional"}.issuperset(kinds):
        return "attention rules vary from batch to batch"
    return None
