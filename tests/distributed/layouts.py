"""The real transformer and objectives on synthetic sequences, in any layout, a few steps long."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from functools import cache
from typing import Any

import torch
from harness import run_ranks
from torch import Tensor

from parallel.engine.base import Engine, EngineConfig
from parallel.engine.build import build_engine
from parallel.layers import partition_dim
from parallel.layout.topology import Topology
from parallel.runtime import init_distributed
from pretrain.batch import CleanBatch, TrainBatch
from pretrain.config.objectives import objectives
from pretrain.config.optimizers import AdamWConfig
from pretrain.config.run import ModelConfig
from pretrain.model.initialize import initialize
from pretrain.model.recompute import Recompute
from pretrain.model.size import stage_costs
from pretrain.model.transformer import Transformer
from pretrain.module import ObjectiveModule
from pretrain.noise.key import NoiseKey
from pretrain.objectives import Objective, build_objective
from pretrain.training.parameter_groups import parameter_groups
from pretrain.vocabulary import TokenSpace

LENGTH, GLOBAL_BATCH, STEPS, SEED = 16, 8, 4, 5
LONG = 20
"""Steps of the same runs in the slow suite."""
SMALL_BUCKET = 2000
"""Elements: less than a matrix of the model has, so that a step takes many buckets."""
SPACE = TokenSpace(
    vocab_size=60, padded_vocab_size=64, pad_id=0, mask_id=1, doc_id=2, never_targets=(0, 1, 3)
)
MODEL = {
    "num_layers": 4,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_query_groups": 4,
    "ffn_hidden_size": 64,
    "vocab_multiple": 64,
    "init_std": 0.08,
    "qk_norm": True,
}


@dataclass(frozen=True)
class Layout:
    """A layout and how the engine runs in it."""

    tp: int = 1
    pp: int = 1
    cp: int = 1
    dp: int = 1
    sp: bool = False
    zero: int = 0
    precision: str = "float32"
    recompute: str = "none"
    chunk: int | None = None
    """Rows of the head at once."""
    offload: str = "none"
    overlap: bool | None = None
    """True also makes buckets smaller than the largest parameter."""
    compiled: bool = False
    compiled_loss: bool = False

    @property
    def ranks(self) -> int:
        return self.tp * self.pp * self.cp * self.dp

    def __str__(self) -> str:
        axes = {"tp": self.tp, "pp": self.pp, "cp": self.cp, "dp": self.dp}
        parts = [f"{name}{size}" for name, size in axes.items() if size > 1]
        further = [*(["sp"] if self.sp else []), f"zero{self.zero}"]
        further += [] if self.recompute == "none" else [self.recompute]
        further += [] if self.chunk is None else [f"chunk{self.chunk}"]
        further += [] if self.precision == "float32" else [self.precision]
        further += [] if self.offload == "none" else ["offload"]
        further += [] if self.overlap is None else ["overlap" if self.overlap else "apart"]
        further += ["compiled"] if self.compiled else []
        further += ["compiled loss"] if self.compiled_loss else []
        return "-".join([*parts, *further])


@dataclass(frozen=True)
class Task:
    """An objective and the model it trains."""

    objective: dict[str, Any]
    model: dict[str, Any] = field(default_factory=dict)
    eps: float = 1e-8
    """Of Adam, which makes a full step of a gradient that is nothing but rounding: Eso-LM has some
    (first positions of an order read only themselves), and two data-parallel ranks already differ
    by 7e-6 in norm after five steps at 1e-8."""


TASKS = {
    "autoregressive": Task({"name": "autoregressive"}),
    "masked": Task({"name": "masked"}, {"tie_embeddings": False, "activation": "gelu"}),
    # The curriculum ends inside a micro-batch of the third step.
    "uniform": Task(
        {"name": "uniform", "curriculum_sequences": 19, "curriculum_temperature": [0.3, 0.05]},
        {"time_conditioning": True, "num_query_groups": 2},
    ),
    "interpolating": Task({"name": "interpolating"}, {"activation": "squared_relu"}),
    "block": Task({"name": "block", "block_size": 4}),
    "esoteric": Task({"name": "esoteric", "alpha0": 0.5}, {"tie_embeddings": False}, 1e-6),
    "orders": Task({"name": "autoregressive", "orders": 3, "hide": "queries"}),
}
WHOLE_TASKS = {
    "gaussian": Task({"name": "gaussian", "reconstruction_share": 0.25}),
}
"""Objectives that need the whole model on every rank: neither pipeline nor context parallelism."""
CONVOLVED_TASKS = {
    "convolved autoregressive": Task({"name": "autoregressive"}, {"short_convolution": 4}),
    "convolved masked": Task(
        {"name": "masked"}, {"short_convolution": 5, "time_conditioning": True}
    ),
}
"""Models with short convolutions: neither context nor sequence parallelism."""
COMPLETE_P = {"parametrization": "complete_p", "base_hidden_size": 16, "base_num_layers": 1}
COMPLETE_P_TASKS = {
    "complete_p autoregressive": Task(
        {"name": "autoregressive"}, {**COMPLETE_P, "tie_embeddings": False}
    ),
    "complete_p uniform": Task({"name": "uniform"}, {**COMPLETE_P, "time_conditioning": True}),
    "complete_p masked": Task({"name": "masked"}, COMPLETE_P),
}
"""Models wider and deeper than their base."""


@cache
def _tokens(step: int) -> Tensor:
    """Sequences in which the next token mostly follows from this one; not to be changed."""
    g = torch.Generator().manual_seed(100 + step)
    tokens = torch.randint(4, 60, (GLOBAL_BATCH, LENGTH), generator=g)
    for i in range(1, LENGTH):
        follow = torch.rand(GLOBAL_BATCH, generator=g) < 0.8
        tokens[:, i] = torch.where(follow, (tokens[:, i - 1] * 3) % 56 + 4, tokens[:, i])
    return tokens


for _step in (*range(STEPS), 99):
    _tokens(_step)  # here, so that ranks are forked with them


def clean_rows(step: int, rows: Tensor) -> CleanBatch:
    """Rows of the global batch of a step; some sequences end early."""
    tokens = _tokens(step)
    valid = torch.ones_like(tokens, dtype=torch.bool)
    valid[1, LENGTH - 5 :] = False
    tokens = torch.where(valid, tokens, SPACE.pad_id)
    valid = valid[rows]
    return CleanBatch(
        tokens=tokens[rows],
        position=step * GLOBAL_BATCH + rows,
        segment=torch.zeros(len(rows), LENGTH, dtype=torch.int32),
        valid=valid,
        all_valid=bool(valid.all()),
    )


class Trainer:
    """One engine on this rank's part of the layout."""

    def __init__(self, layout: Layout, task: Task, **changes: Any) -> None:
        init_distributed(timeout_minutes=2)
        self.topology = Topology.build(
            tensor_parallel_size=layout.tp,
            pipeline_parallel_size=layout.pp,
            context_parallel_size=layout.cp,
            data_parallel_size=layout.dp,
            sequence_parallel=layout.sp,
            zero_stage=layout.zero,
            precision=layout.precision,
        )
        config = objectives.make(time_window=GLOBAL_BATCH, **task.objective)
        self.objective: Objective = build_objective(config, SPACE)
        model_config = ModelConfig(**{**MODEL, **task.model})
        layers, head = stage_costs(model_config, SPACE.padded_vocab_size, self.objective.head_share)
        stage = self.topology.stage(layers, last_cost=head)
        recompute = Recompute(layout.recompute)  # type: ignore[arg-type]
        causal = config.convolution == "causal"
        model = Transformer(model_config, SPACE, self.topology, stage, recompute, causal)
        initialize(model, SEED)
        if layout.compiled:
            model.compile_layers()
        module = ObjectiveModule(
            model, self.objective, loss_chunk=layout.chunk, compile_loss=layout.compiled_loss
        )
        if task.model.get("time_conditioning"):
            # A fresh conditioned model is the identity in its condition; that would test nothing.
            _shake_modulations(module)
        optimizer = AdamWConfig(lr=3e-3, eps=task.eps)
        self.per_rank = GLOBAL_BATCH // layout.dp
        if layout.overlap:
            changes = {"reduce_bucket_size": SMALL_BUCKET, **changes}
        settings = EngineConfig(
            zero_stage=layout.zero,
            precision=layout.precision,  # type: ignore[arg-type]
            micro_batch_size=self.per_rank // 2,
            num_microbatches=2,
            clip_grad_norm=0.5,
            whole_below=0,  # or ZeRO 3 would leave a model as small as this one whole
            **{
                "optimizer": optimizer.spec(),
                "offload": layout.offload,
                "overlap_comm": layout.overlap,
                **changes,
            },
        )
        self.start = {n: p.detach().clone() for n, p in module.named_parameters()}
        self.engine: Engine = build_engine(
            module, parameter_groups(module, optimizer), settings, self.topology
        )

    def batches(self, step: int) -> list[TrainBatch]:
        """This rank's micro-batches of the global batch of `step`."""
        rows = torch.arange(GLOBAL_BATCH).view(2, self.topology.data_parallel_size, -1)
        made = []
        for own in rows[:, self.topology.dp_rank]:
            clean = clean_rows(step, own)
            noise = NoiseKey(SEED, clean.position)
            batch = self.objective.corrupt(clean, noise)
            made.append(replace(batch, dropout_seed=noise.number("dropout")))
        return made

    def train(self, start: int, stop: int) -> list[tuple[float, float]]:
        """Loss and gradient norm of each step."""
        curve = []
        for step in range(start, stop):
            valid = int(clean_rows(step, torch.arange(GLOBAL_BATCH)).valid.sum())
            result = self.engine.step(self.batches(step), valid, 3e-3 / (1 + step / 10))
            assert result.applied
            curve.append((float(result.loss), float(result.grad_norm)))
        return curve

    def evaluate(self) -> list[float]:
        """Bounds of this data-parallel rank's rows of a batch that was not trained on."""
        own = torch.arange(GLOBAL_BATCH).view(self.topology.data_parallel_size, -1)
        clean = clean_rows(99, own[self.topology.dp_rank])
        noise = NoiseKey(SEED, clean.position)
        bound = self.engine.evaluate(self.objective.bound_batch(clean, noise))
        parts = max(1, len(self.objective.bound_parts))
        return bound.view(parts, -1).sum(dim=0).tolist()

    def weights(self) -> dict[str, Tensor]:
        """Whole float32 weights, on every rank."""
        return {name: self.engine.read(name, "weight").clone() for name in self.names()}

    def names(self) -> list[str]:
        """Canonical names of all parameters of the model, on every rank alike."""
        return list(self.engine.shapes)


def _shake_modulations(module: torch.nn.Module) -> None:
    """Small keyed values in the zero-initialised modulations, the same in every layout."""
    for name, parameter in module.named_parameters():
        if "modulation" in name and partition_dim(parameter) is None:
            g = torch.Generator().manual_seed(sum(name.encode()))
            parameter.data.add_(0.02 * torch.randn(parameter.shape, generator=g))


def shallow(task: Task) -> Task:
    """The task with two layers, where more prove nothing."""
    return replace(task, model={**task.model, "num_layers": 2})


def train_task(layout: dict[str, Any], task: str, steps: int, deep: bool) -> dict[str, Any]:
    """A whole short run in a layout: curve, evaluation, start and end."""
    chosen = {**TASKS, **WHOLE_TASKS, **CONVOLVED_TASKS, **COMPLETE_P_TASKS}[task]
    trainer = Trainer(Layout(**layout), chosen if deep else shallow(chosen))
    start = trainer.weights()
    curve = trainer.train(0, steps)
    return {
        "curve": curve,
        "bound": trainer.evaluate(),
        "start": start,
        "end": trainer.weights(),
        "dp_rank": trainer.topology.dp_rank,
    }


def as_dict(layout: Layout) -> dict[str, Any]:
    """A layout as plain values, to send to ranks."""
    return asdict(layout)


@cache
def one_rank(task: str, steps: int = STEPS, deep: bool = False) -> dict[str, Any]:
    """What `train_task` gives on one rank at stage 0: made once for all files of a session."""
    return run_ranks(1, train_task, as_dict(Layout()), task, steps, deep)[0]


def beside_one_rank(
    layout: Layout, task: str, steps: int = STEPS
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """`train_task` on every rank of a layout, and the same run on one; as many layers as stages
    need to be of unequal lengths."""
    deep = layout.pp > 1
    results = run_ranks(layout.ranks, train_task, as_dict(layout), task, steps, deep, timeout=300)
    return results, one_rank(task, steps, deep)
