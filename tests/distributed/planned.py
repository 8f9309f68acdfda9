"""What ranks really hold, beside what the planner says: for `test_planner.py`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from layouts import GLOBAL_BATCH, LENGTH, MODEL, SPACE, TASKS, Cut, Trainer
from torch import Tensor

from parallel.planner.candidate import Candidate
from parallel.planner.costs import ModelCost
from parallel.planner.plan import estimate_stages
from parallel.rules import Layout
from pretrain.config import Config
from pretrain.model_cost import model_cost
from pretrain.plan import objective_cost


def numbers(task: str) -> tuple[Config, ModelCost]:
    """Configuration and costs of a task of `layouts`."""
    config = Config.model_validate(
        {
            "data": {"train": "a", "validation": "b", "tokenizer": "c", "seq_length": LENGTH},
            "model": {**MODEL, **TASKS[task].model},
            "objective": TASKS[task].objective,
            "train": {"global_batch_size": GLOBAL_BATCH},
        }
    )
    objective = objective_cost(config, SPACE.vocab_size)
    return config, model_cost(config, SPACE.padded_vocab_size, objective)


def candidate(cut: Cut, micro_batch_size: int = 1, count: int = 2) -> Candidate:
    """A cut as the planner takes it."""
    return Candidate(
        layout=Layout(cut.tp, cut.pp, cut.cp, cut.dp, cut.sp),
        zero_stage=cut.zero,
        micro_batch_size=micro_batch_size,
        num_microbatches=count,
        precision=cut.precision,
    )


def unique_bytes(tensors: Iterable[Tensor | None]) -> int:
    """Bytes of the storages under these tensors, each counted once."""
    storages = {}
    for tensor in tensors:
        if tensor is not None:
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def held_and_planned(cut: dict[str, Any], task: str) -> dict[str, tuple[int, int]]:
    """Bytes of parameters and optimizer on this rank after a step: (real, planned)."""
    trainer = Trainer(Cut(**cut), TASKS[task])
    trainer.train(0, 1)
    engine, stage = trainer.engine, trainer.topology.pp_rank
    parameters = list(engine.module.parameters())
    weights = [p.data for p in parameters] + [getattr(p, "ds_tensor", None) for p in parameters]
    at_weights = {t.untyped_storage().data_ptr() for t in weights if t is not None}
    optimizer = [v for state in engine.optimizer.state.values() for v in state.values()]
    masters = [p for group in engine.optimizer.param_groups for p in group["params"]]
    if hasattr(engine.deepspeed.optimizer, "fp32_partitioned_groups_flat"):
        masters += engine.deepspeed.optimizer.fp32_partitioned_groups_flat
    masters = [p for p in masters if p.untyped_storage().data_ptr() not in at_weights]
    tensors = [v for v in [*optimizer, *masters] if isinstance(v, Tensor)]
    _, model = numbers(task)
    planned = estimate_stages(model, candidate(Cut(**cut)))[stage].state
    return {
        "parameters": (unique_bytes(weights), planned.parameters),
        "optimizer": (unique_bytes(tensors), planned.optimizer),
    }


def saved_and_planned(cut: dict[str, Any], task: str) -> tuple[int, float]:
    """Bytes that a forward pass of this rank keeps for backward, parameters apart, and planned."""
    trainer = Trainer(Cut(**cut), TASKS[task])
    module, batch = trainer.engine.module, trainer.batches(0)[0]
    own = {p.untyped_storage().data_ptr() for p in module.parameters()}
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        module(batch)
    kept = [t for t in kept if t.untyped_storage().data_ptr() not in own]
    planned = estimate_stages(numbers(task)[1], candidate(Cut(**cut), batch.ids.shape[0]))[0]
    return unique_bytes(kept), planned.activations
