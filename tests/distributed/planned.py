"""What ranks really hold, beside what the planner says: for `test_planner.py`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from layouts import GLOBAL_BATCH, LENGTH, MODEL, SEED, SPACE, TASKS, Cut, Trainer
from torch import Tensor

from parallel.planner.candidate import Candidate
from parallel.planner.costs import ModelCost
from parallel.planner.plan import estimate_stages
from parallel.rules import Layout
from parallel.runtime import init_distributed
from parallel.topology import Topology
from pretrain.batch import CleanBatch
from pretrain.config import Config
from pretrain.model_cost import model_cost
from pretrain.noise.key import NoiseKey
from pretrain.objectives import build_objective
from pretrain.plan import objective_cost
from pretrain.session import build_model
from pretrain.vocabulary import TokenSpace


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
    objective = objective_cost(config, SPACE.vocab_size, on_gpu=False)
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


@dataclass(frozen=True)
class Case:
    """A forward pass whose saved tensors are counted."""

    objective: str = "autoregressive"
    model: dict[str, Any] = field(default_factory=dict)
    cut: Cut = Cut()
    batch_size: int = 4
    length: int = 64

    def __str__(self) -> str:
        shape = ",".join(f"{k}={v}" for k, v in self.model.items())
        return f"{self.objective} b{self.batch_size} s{self.length} {shape} {self.cut}"

    @property
    def config(self) -> Config:
        """The configuration that is planned and built."""
        return Config.model_validate(
            {
                "data": {"train": "a", "validation": "b", "tokenizer": "c"}
                | {"seq_length": self.length},
                "model": {**SHAPE, **self.model},
                "objective": {"name": self.objective, "time_window": self.batch_size},
                "train": {"global_batch_size": self.batch_size},
            }
        )


SHAPE = {
    "num_layers": 4,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "ffn_hidden_size": 192,
    "vocab_multiple": 64,
}
VOCABULARY = TokenSpace(250, 256, 0, 1, 2, (0, 1, 3))


def saved_and_planned(cases: list[Case]) -> list[tuple[int, float]]:
    """Bytes that the forward pass of each case keeps for backward on this rank, and as planned.

    Parameters are not counted; a storage is counted once, whoever keeps it.
    """
    init_distributed(timeout_minutes=2)
    return [_saved_and_planned(case) for case in cases]


def _saved_and_planned(case: Case) -> tuple[int, float]:
    config, cut = case.config, case.cut
    topology = Topology.build(
        tensor_parallel_size=cut.tp,
        pipeline_parallel_size=cut.pp,
        context_parallel_size=cut.cp,
        sequence_parallel=cut.sp,
        zero_stage=cut.zero,
    )
    objective = build_objective(config.objective, VOCABULARY)
    module = build_model(config, topology, objective)
    torch.manual_seed(0)
    tokens = torch.randint(4, 250, (case.batch_size, case.length))
    clean = CleanBatch(
        tokens=tokens,
        position=torch.arange(case.batch_size),
        segment=torch.zeros_like(tokens, dtype=torch.int32),
        valid=torch.ones_like(tokens, dtype=torch.bool),
        all_valid=True,
    )
    batch = objective.corrupt(clean, NoiseKey(SEED, clean.position))
    carried = {}
    if not topology.is_first_stage:
        h = config.model.hidden_size
        carried["carried"] = (torch.zeros(case.length, case.batch_size, h, requires_grad=True),)
    own = {p.untyped_storage().data_ptr() for p in module.parameters()}
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        module(batch, **carried)
    kept = [t for t in kept if t.untyped_storage().data_ptr() not in own]
    share = len(batch.targets) / clean.tokens.numel()  # of this batch, not on average
    cost = replace(
        objective_cost(config, VOCABULARY.vocab_size, on_gpu=False), head_share=share
    )
    model = model_cost(config, VOCABULARY.padded_vocab_size, cost)
    planned = estimate_stages(model, candidate(cut, case.batch_size, 1))[topology.pp_rank]
    return unique_bytes(kept), planned.activations
