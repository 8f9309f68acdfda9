"""Whole training runs on harness ranks: the real loop on real text, small enough for a laptop."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

SHAPE = [
    "model.num_layers=2",
    "model.hidden_size=32",
    "model.num_attention_heads=4",
    "model.qk_norm=true",
    "model.init_std=0.1",
    "data.seq_length=32",
    "data.unique_tokens=1500",  # 47 sequences, the last with 28 tokens
    "data.epochs=2.5",
    "train.global_batch_size=8",
    "train.log_interval=1",
    "train.checkpoint_interval=4",
    "train.eval_epochs=[1]",
    "train.keep_checkpoints=0",
    "optimizer.lr=5e-3",
    "optimizer.clip_grad_norm=0.3",  # active in most steps
    "evaluation.sequences=24",
    "evaluation.batch_size=8",
    "tracking.mlflow=false",
    "run.device=cpu",
]
ADAPTING = ("objective=block", "objective.adapt_clip=true", "evaluation.batch_size=24")
"""An objective whose training depends on what is measured: 1,024 times, in as few forward passes as
the 24 sequences allow."""
STEPS = 15
"""Of such a run: 2.5 epochs of 47 sequences in batches of 8, the last one partly empty."""


def overrides(pool: Path, run: Path, *more: str) -> list[str]:
    """Overrides of a small run on `pool` in the folder `run`."""
    return [
        *SHAPE,
        f"data.train={pool / 'train' / 'manifest.json'}",
        f"data.validation={pool / 'validation' / 'manifest.json'}",
        f"data.tokenizer={pool / 'tokenizer.model'}",
        f"run.dir={run}",
        *more,
    ]


def train(
    pool: Path,
    run: Path,
    *more: str,
    kill_at: int | None = None,
    when: str = "",
    signal_at: int | None = None,
) -> int:
    """Run the train loop on this rank; with `kill_at` die by SIGKILL at that step.

    `when` is "before" or "after" the step's hooks, or "saving" inside the writing of its
    checkpoint. With `signal_at` SIGTERM comes during that step.
    """
    from pretrain import train
    from pretrain.training import hooks

    if signal_at is not None:
        _signal(hooks.Hooks, signal_at)

    if kill_at is not None:
        _die(hooks.Hooks, kill_at, when)
    return train.main(overrides(pool, run, *more))


def _die(hooks: Any, step: int, when: str) -> None:
    from parallel.checkpoint import background, save

    def kill(*arguments: Any, **options: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    original = hooks.after_step

    def after_step(self: Any, *arguments: Any) -> None:
        if self.session.state.step == step and when == "before":
            kill()
        if self.session.state.step == step and when == "saving":
            save.commit = background.commit = kill
        original(self, *arguments)
        if self.session.state.step == step:
            kill()

    hooks.after_step = after_step


def _signal(hooks: Any, step: int) -> None:
    original = hooks.after_step

    def after_step(self: Any, *arguments: Any) -> None:
        if self.session.state.step == step:
            os.kill(os.getpid(), signal.SIGTERM)
        original(self, *arguments)

    hooks.after_step = after_step


def log(run: Path) -> dict[int, dict[str, float]]:
    """Measurements by step, without times and speeds."""
    steps: dict[int, dict[str, float]] = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        kept = {k: v for k, v in record.items() if k != "time" and "per_second" not in k}
        steps.setdefault(kept.pop("step"), {}).update(kept)
    return steps


def checkpoint(run: Path, step: int) -> dict[str, Any]:
    """Every tensor of a checkpoint by name, and its state under "state"."""
    from safetensors.torch import load_file

    folder = run / "checkpoints" / f"step-{step:08d}"
    tensors: dict[str, Any] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    manifest = json.loads((folder / "manifest.json").read_text())
    state = manifest["state"]
    return tensors | {"state": {k: state[k] for k in ("train", "cursor")}}
