"""`epochal evaluate`: the exact bound of a trained run, recorded with its checkpoint's name."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from pretrain.batch import TrainBatch
from pretrain.data import training_stream, validation_stream
from pretrain.errors import ConfigError
from pretrain.evaluation.likelihood import evaluate_likelihood
from pretrain.evaluation.restore import Weights, restore
from pretrain.evaluation.text_bytes import TextBytes
from pretrain.results import append_results


def evaluate_run(
    run: Path,
    *,
    checkpoint: Path | None = None,
    weights: Weights | None = None,
    draws: int | None = None,
    sequences: int | None = None,
    split: Literal["validation", "train"] = "validation",
) -> dict[str, Any]:
    """Evaluate the likelihood of `split` under a run's weights; None takes the run's settings.

    The result is also appended to `RUN/evaluations.jsonl`.
    """
    given = {"draws": draws, "sequences": sequences}
    changes = {name: value for name, value in given.items() if value is not None}
    for name, value in changes.items():
        if value < 1:
            raise ConfigError(f"{name} is {value}; allowed: 1 or more")
    restored = restore(run, checkpoint, weights)
    config, module = restored.config, restored.module
    settings = config.evaluation.model_copy(update=changes)
    stream = validation_stream(config) if split == "validation" else training_stream(config)

    def score(batch: TrainBatch) -> Tensor:
        with torch.no_grad():
            bound: Tensor = module(batch, exact=True)
        return bound

    likelihood = evaluate_likelihood(
        module.objective,
        stream,
        score,
        settings,
        TextBytes(restored.tokenizer),
        device=restored.runtime.device,
    )
    result = {
        "run": str(run),
        "checkpoint": restored.checkpoint.name,
        "weights": restored.weights,
        "step": restored.step,
        "objective": config.objective.name,
        "split": split,
        **likelihood.to_dict(),
    }
    append_results(run / "evaluations.jsonl", [result])
    return result
