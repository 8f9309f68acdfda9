"""What ranks really hold, beside what the planner says: for `test_planner.py`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from foreign import SPECS
from layouts import (
    COMPLETE_P_TASKS,
    CONVOLVED_TASKS,
    GLOBAL_BATCH,
    LENGTH,
    MODEL,
    SEED,
    SPACE,
    TASKS,
    WHOLE_TASKS,
    Layout,
    Task,
    Trainer,
    shallow,
)
from torch import Tensor

from parallel.layout import rules
from parallel.layout.topology import Topology
from parallel.planner import offload
from parallel.planner.candidate import Candidate
from parallel.planner.costs import ModelCost
from parallel.planner.plan import estimate_stages
from parallel.runtime import init_distributed
from pretrain.batch import CleanBatch, TrainBatch
from pretrain.build import build_model
from pretrain.config.run import Config
from pretrain.model.recompute import Keep
from pretrain.model.teacher import Teacher
from pretrain.model.transformer import Transformer
from pretrain.module import ObjectiveModule
from pretrain.noise.key import NoiseKey
from pretrain.objectives import build_objective
from pretrain.planning.cost import model_cost
from pretrain.planning.plan import objective_cost
from pretrain.vocabulary import TokenSpace

DISTILLED = "distillation"
TASKS_HERE = {
    **TASKS,
    **WHOLE_TASKS,
    **CONVOLVED_TASKS,
    **COMPLETE_P_TASKS,
    DISTILLED: Task({"name": DISTILLED, "round_sequences": 80}, {"time_conditioning": True}),
}


def chosen(layout: Layout, name: str) -> Task:
    """A task with as many layers as stages need to be of unequal lengths."""
    return TASKS_HERE[name] if layout.pp > 1 else shallow(TASKS_HERE[name])


def numbers(task: Task) -> ModelCost:
    """Costs of a task of `layouts`."""
    config = Config.model_validate(
        {
            "data": {"train": "a", "validation": "b", "tokenizer": "c", "seq_length": LENGTH},
            "model": {**MODEL, **task.model},
            "objective": task.objective,
            "train": {"global_batch_size": GLOBAL_BATCH},
        }
    )
    objective = objective_cost(config, SPACE.vocab_size, on_gpu=False)
    return model_cost(config, SPACE.padded_vocab_size, objective)


def candidate(layout: Layout, micro_batch_size: int = 1, count: int = 2) -> Candidate:
    """A layout as the planner takes it."""
    return Candidate(
        layout=rules.Layout(layout.tp, layout.pp, layout.cp, layout.dp, layout.sp),
        zero_stage=layout.zero,
        micro_batch_size=micro_batch_size,
        num_microbatches=count,
        optimizer=SPECS["adamw"],
        precision=layout.precision,
        recompute=layout.recompute,  # type: ignore[arg-type]
        whole_below=0,  # as `layouts` has it
    )


def unique_bytes(tensors: Iterable[Tensor | None]) -> int:
    """Bytes of the storages under these tensors, each counted once."""
    storages = {}
    for tensor in tensors:
        if tensor is not None:
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def held_and_planned(
    cases: list[tuple[Layout, str, bool, str]],
) -> list[dict[str, tuple[int, int]]]:
    """For each (layout, task, EMA, optimizer): bytes on this rank after a step by kind, (real,
    planned)."""
    return [_held_and_planned(*case) for case in cases]


def _held_and_planned(
    layout: Layout, name: str, ema: bool, optimizer: str
) -> dict[str, tuple[int, int]]:
    spec, task = SPECS[optimizer], chosen(layout, name)
    trainer = Trainer(layout, task, optimizer=spec, ema_decay=0.9 if ema else 0.0)
    engine = trainer.engine
    teacher = add_teacher(engine.module, trainer.topology)
    trainer.train(0, 1)
    stage = trainer.topology.pp_rank
    parameters = list(engine.module.parameters())
    weights = [p.data for p in parameters] + [getattr(p, "ds_tensor", None) for p in parameters]
    at_weights = {t.untyped_storage().data_ptr() for t in weights if t is not None}
    states = [v for state in engine.optimizer.state.values() for v in state.values()]
    masters = [p for group in engine.optimizer.param_groups for p in group["params"]]
    # Stage 3 hands its float32 weights to the optimizer only while it steps.
    masters += getattr(engine.deepspeed.optimizer, "fp32_partitioned_groups_flat", [])
    masters = [p for p in masters if p.untyped_storage().data_ptr() not in at_weights]
    tensors = [v for v in [*states, *masters] if isinstance(v, Tensor)]
    plan = replace(candidate(layout), averages=int(ema), optimizer=spec)
    memory = estimate_stages(numbers(task), plan)[stage]
    planned = memory.state
    return {
        "parameters": (unique_bytes(weights), planned.parameters),
        "optimizer": (unique_bytes(tensors), planned.optimizer + planned.averages),
        "teacher": (unique_bytes(teacher), memory.teacher),
    }


def hosted_and_planned(
    layouts: list[Layout], optimizer: str = "adamw"
) -> list[tuple[int, int, float, int]]:
    """For each offloading layout: bytes of parameters that stay, and of what moves into host memory
    (nothing is pinned here), on this rank after a step; (real, planned, real, planned)."""
    offload.pinned = int  # type: ignore[assignment]
    return [_hosted_and_planned(layout, optimizer) for layout in layouts]


HOSTED = (
    "single_partition_of_fp32_groups", "param_buffer_of_bit16_for_cpu_offload_groups",
    "accumulated_grads_in_cpu", "temp_grad_buffer_for_cpu_offload",  # stages 1 and 2
    "fp32_partitioned_groups_flat", "fp16_partitioned_groups_flat", "grad_partitions_flat_buffer",
)  # fmt: skip
"""Where DeepSpeed refers to what it has in host memory, beside the optimizer's state."""


def _hosted_and_planned(layout: Layout, optimizer: str) -> tuple[int, int, float, int]:
    spec, task = SPECS[optimizer], chosen(layout, "autoregressive")
    trainer = Trainer(layout, task, optimizer=spec, ema_decay=0.9)
    trainer.train(0, 1)
    host: Any = trainer.engine.deepspeed.optimizer
    kept: list[Tensor] = []
    for name in HOSTED:
        there = getattr(host, name, ())
        values = there.values() if isinstance(there, dict) else there
        kept += [there] if isinstance(there, Tensor) else values
    kept += [t.grad for t in kept if t.grad is not None]
    states = [v for state in host.optimizer.state.values() for v in state.values()]
    kept += [v for v in states if isinstance(v, Tensor) and v.numel() > 1]
    weights = [] if layout.zero == 3 else [p.data for p in trainer.engine.module.parameters()]
    plan = replace(candidate(layout), averages=1, optimizer=spec, offload=layout.offload)  # type: ignore[arg-type]
    state = estimate_stages(numbers(task), plan)[0].state
    return unique_bytes(weights), state.parameters, unique_bytes(kept), state.host


def add_teacher(module: ObjectiveModule, topology: Topology) -> list[Tensor]:
    """Weights of the frozen copy that the module's objective learns from; [] where it has none."""
    if not module.objective.teacher:
        return []
    model = module.model
    module.teacher = Teacher(Transformer(model.config, model.space, topology))
    module.teacher.renew(model)
    return list(module.teacher.parameters.values())


ONE_RANK = Layout()


@dataclass(frozen=True)
class Case:
    """A forward pass whose saved tensors are counted."""

    objective: str = "autoregressive"
    model: dict[str, Any] = field(default_factory=dict)
    layout: Layout = ONE_RANK
    batch_size: int = 4
    length: int = 64
    loss_chunk: int | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    """Of the objective."""

    def __str__(self) -> str:
        shape = ",".join(f"{k}={v}" for k, v in {**self.settings, **self.model}.items())
        return f"{self.objective} b{self.batch_size} s{self.length} {shape} {self.layout}"

    @property
    def config(self) -> Config:
        """The configuration that is planned and built."""
        return Config.model_validate(
            {
                "data": {"train": "a", "validation": "b", "tokenizer": "c"}
                | {"seq_length": self.length},
                "model": {**SHAPE, **self.model},
                "objective": {
                    "name": self.objective,
                    "time_window": self.batch_size,
                    **self.settings,
                },
                "train": {
                    "global_batch_size": self.batch_size,
                    "recompute": self.layout.recompute,
                    "loss_chunk": self.loss_chunk,
                },
            }
        )


SHAPE = {
    "num_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "ffn_hidden_size": 192,
    "vocab_multiple": 64,
}
VOCABULARY = TokenSpace(250, 256, 0, 1, 2, (0, 1, 3))


def saved_and_planned(cases: list[Case]) -> list[tuple[int, int, float]]:
    """Bytes that the forward pass of each case keeps for backward on this rank, parameters apart:
    by autograd, by the allocator (on one rank; 0 on several), by the planner."""
    init_distributed(timeout_minutes=2)
    return [_saved_and_planned(case) for case in cases]


def _saved_and_planned(case: Case) -> tuple[int, int, float]:
    config, layout = case.config, case.layout
    topology = Topology.build(
        tensor_parallel_size=layout.tp,
        pipeline_parallel_size=layout.pp,
        context_parallel_size=layout.cp,
        sequence_parallel=layout.sp,
        zero_stage=layout.zero,
    )
    objective = build_objective(config.objective, VOCABULARY)
    module = build_model(config, topology, objective)
    add_teacher(module, topology)
    torch.manual_seed(0)
    tokens = torch.randint(4, 250, (case.batch_size, case.length))
    clean = CleanBatch(
        tokens=tokens,
        position=torch.arange(case.batch_size),
        segment=torch.zeros_like(tokens, dtype=torch.int32),
        valid=torch.ones_like(tokens, dtype=torch.bool),
        all_valid=True,
    )
    noise = NoiseKey(SEED, clean.position)
    batch = replace(objective.corrupt(clean, noise), dropout_seed=noise.number("dropout"))
    carried = {}
    if not topology.is_first_stage:
        h = config.model.hidden_size
        carried["carried"] = (torch.zeros(case.length, case.batch_size, h, requires_grad=True),)
    taken = taken_bytes(module, batch, carried) if topology.world_size == 1 else 0
    saved = saved_bytes(module, batch, carried)
    share = len(batch.targets) / clean.tokens.numel()  # of this batch, not on average
    cost = replace(objective_cost(config, VOCABULARY.vocab_size, on_gpu=False), head_share=share)
    model = model_cost(config, VOCABULARY.padded_vocab_size, cost)
    planned = estimate_stages(model, candidate(layout, case.batch_size, 1))[topology.pp_rank]
    return saved, taken, planned.activations


def taken_bytes(module: ObjectiveModule, batch: TrainBatch, carried: dict[str, Any]) -> int:
    """Bytes that a forward pass keeps as the allocator sees it: all that is taken and not given
    back, which on several ranks would be buffers of messages under way too."""
    module(batch, **carried)  # buffers that stay, like those of gathers
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        out = module(batch, **carried)
    taken = sum(event.nbytes() for event in profile.profiler.kineto_results.events())
    return taken - (0 if isinstance(out, Tensor) else out[0].nbytes)


def saved_bytes(module: ObjectiveModule, batch: TrainBatch, carried: dict[str, Any]) -> int:
    """Bytes that a forward pass keeps as autograd says it.

    Hooks see what it saves, parameters apart, each storage counted once; what `Keep` saves in place
    of a tensor is counted for it.
    """
    own = {p.untyped_storage().data_ptr() for p in module.parameters()}
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept.append(tensor)
        return tensor

    def pack(self: Keep, tensor: Tensor) -> Any:
        packed = original(self, tensor)
        inputs = [packed] if isinstance(packed, Tensor) else packed.base.inputs
        for x in inputs:
            if isinstance(x, Tensor):
                keep(x)
        return packed

    original, Keep._pack = Keep._pack, pack  # type: ignore[method-assign]
    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            module(batch, **carried)
    finally:
        Keep._pack = original  # type: ignore[method-assign]
    return unique_bytes(kept)
