"""Runs of the toy model around a checkpoint, executed on ranks by the tests of checkpoints."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import torch

from parallel.checkpoint import read_manifest

CURSOR = {"position": 24, "seed": 17, "tiny": 0.1 + 0.2}


def build(tp: int, zero_stage: int, **changes: Any):
    """A toy engine on the ranks of this call."""
    import toy

    from parallel.layout.topology import Topology
    from parallel.runtime import init_distributed

    init_distributed(timeout_minutes=1)
    topology = Topology.build(tensor_parallel_size=tp, zero_stage=zero_stage, timeout_minutes=1)
    return toy.toy_engine(topology, zero_stage, **changes)


def everything(engine) -> dict[str, torch.Tensor]:
    """Whole weights and moments."""
    kinds = ("weight", "exp_avg", "exp_avg_sq") if engine.optimizer_step else ("weight",)
    return {
        f"{kind}/{n}": engine.read(n, kind).clone() for n in engine.parameters for kind in kinds
    }


def go(engine, start: int, stop: int) -> list[tuple[float, float]]:
    """Train; loss and gradient norm of every step."""
    import toy

    results = [toy.toy_step(engine, step) for step in range(start, stop)]
    return [(float(r.loss), float(r.grad_norm)) for r in results]


def save_and_go_on(folder: Path, tp: int, zero: int, saves: tuple[int, ...], stop: int, **changes):
    """Train to `stop`, saving on the way; the curve, and all tensors at the first save and end."""
    from parallel.checkpoint import save_checkpoint

    engine = build(tp, zero, **changes)
    curve, done, at_save = [], 0, {}
    for step in saves:
        curve += go(engine, done, step)
        done = step
        save_checkpoint(engine, folder, step, CURSOR)
        at_save = at_save or everything(engine)
    curve += go(engine, done, stop)
    return curve, at_save, everything(engine)


def resume_and_go_on(folder: Path, tp: int, zero: int, stop: int, **changes):
    """Load the newest checkpoint into a fresh engine and train to `stop`."""
    from parallel.checkpoint import load_latest

    engine = build(tp, zero, **changes)
    go(engine, 50, 51)  # what a fresh engine has done before must leave no trace
    path, state = load_latest(engine, folder)
    restored = everything(engine)
    start = read_manifest(path).step
    return state, restored, go(engine, start, stop), everything(engine)


def dying_at(call: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A wrapper for file operations: the `call`-th one of all that are wrapped is never made, its
    process is killed instead."""
    calls = count(1)

    def counted(original: Callable[..., Any]) -> Callable[..., Any]:
        def operation(*args: Any, **kwargs: Any) -> Any:
            if next(calls) == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        return operation

    return counted
