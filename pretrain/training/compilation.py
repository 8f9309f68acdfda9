"""Whether layers and loss are compiled: what was asked for, and what stands against it.

A compiled layer is right only where a layer sees the same shapes and numbers in every batch; where
it does not, it would be compiled again for each. A loss is the same formula in every batch. Free
of torch, as the configuration is.
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
    """Whether layers are compiled, and the words for it."""

    on: bool
    said: str


def choose_compilation(config: Config, device: str, kinds: Iterable[AttentionKind]) -> Compilation:
    """What `train.compile` comes to on a device (`cpu` or `cuda`) with these attention rules."""
    if config.train.compile is True:
        return Compilation(True, "on")
    if config.train.compile is False:
        return Compilation(False, "off")
    obstacle = _preference(config, device, kinds) or conflict(config) or missing_compiler()
    return Compilation(False, f"off: {obstacle}") if obstacle else Compilation(True, "on")


def conflict(config: Config) -> str | None:
    """The setting beside which layers cannot be compiled and what is allowed for it, or None."""
    p, m = config.parallel, config.model
    if p.zero_stage == 3:
        # Its hooks gather a parameter when a module is entered, which a compiled layer never does.
        return "parallel.zero_stage is 3, allowed are 0, 1 and 2"
    if p.context_parallel_size > 1:
        return f"parallel.context_parallel_size is {p.context_parallel_size}, allowed is 1"
    for name in ("dropout", "attention_dropout"):
        if getattr(m, name) > 0:
            # The seed of a mask is a number of its own in each layer and micro-batch.
            return f"model.{name} is {getattr(m, name)}, allowed is 0"
    if config.data.documents == "masked":
        return "data.documents is masked (bounds vary from batch to batch), allowed is packed"
    return None


def loss_conflict(config: Config) -> str | None:
    """The setting beside which the loss cannot be compiled and what is allowed for it, or None."""
    ranks = config.parallel.tensor_parallel_size
    if ranks > 1:  # the sums over ranks lie in the middle of the formula
        return f"parallel.tensor_parallel_size is {ranks}, allowed is 1"
    if not config.objective.scores_in_chunks:
        return f"objective is {config.objective.name}, which scores the vocabulary in its own pass"
    return None


def missing_compiler() -> str | None:
    """What torch.compile would miss on this machine, or None."""
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        return f"there is no C++ compiler ({compiler}); install g++ or name one in CXX"
    if not Path(sysconfig.get_paths()["include"], "Python.h").is_file():
        return "Python's headers are missing (Python.h); install python3-dev"
    return None


def _preference(config: Config, device: str, kinds: Iterable[AttentionKind]) -> str | None:
    """Where `auto` leaves layers alone although they could be compiled."""
    if device != "cuda":
        return "the kernels for the CPU are written by hand"
    if config.train.precision != "bfloat16":
        return "train.precision is float32"
    if config.parallel.tensor_parallel_size > 1:
        return "tensor parallelism cuts layers into small graphs"
    if not {"causal", "bidirectional"}.issuperset(kinds):
        return "attention rules vary from batch to batch"
    return None
