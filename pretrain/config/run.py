"""Typed tree of all settings; Hydra composes it (`pretrain.config.compose`), pydantic validates it.

Every field has its documentation below it; unknown keys are refused. The sections `model`,
`objective` and `optimizer` have separate modules. Checks of one section are in its class, those
between sections in `pretrain.config.combinations`, and checks against files in
`pretrain.config.preflight`. Free of torch: the command line validates in milliseconds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from parallel.layout.rules import Layout
from pretrain.config.model import ModelConfig
from pretrain.config.objectives import AnyObjective, ObjectiveConfig, objectives
from pretrain.config.optimizers import (
    AnyOptimizer,
    OptimizerConfig,
    ScheduleConfig,
    optimizers,
)
from pretrain.config.registry import Registry
from pretrain.config.trackers import TrackingConfig
from pretrain.config.types import Location, Order, PositiveInt, Section

__all__ = [
    "Config",
    "DataConfig",
    "EvaluationConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "RunConfig",
    "ScheduleConfig",
    "TrackingConfig",
    "TrainConfig",
    "resolve",
]

REGISTRIES: dict[str, Registry[Any]] = {"objective": objectives, "optimizer": optimizers}
"""Registries of the sections whose class follows from their `name`."""


class RunConfig(Section):
    """Folder, seed, initial weights and device of the run."""

    name: str = "run"
    """Name in MLflow and on the console; also the folder below `root` where `dir` is not given, so
    that it is not empty and has no `..`."""
    root: Path = Path("runs")
    dir: Path | None = None
    """Folder of this run: configuration, checkpoints, logs. Default: `root`/`name`."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 17
    """Seed of weights, noise, order of the data and dropout."""
    init_from: Path | None = None
    """Safetensors file whose weights the run starts with, e.g. one of `epochal export`; null
    initialises from the seed. Names and shapes must be those of the model."""
    branch_from: Path | None = None
    """Run or checkpoint folder whose whole state the run starts with, its position included; of a
    run the newest checkpoint that fits the schedule, which the first start fills in."""
    branch_sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = None
    """Hash of that checkpoint's manifest, filled in by the first start; a given one is compared."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes CUDA where torch sees a GPU, else the CPU."""

    @field_validator("name")
    @classmethod
    def _stays_below_root(cls, name: str) -> str:
        if not name.strip(" ./") or ".." in Path(name).parts or Path(name).is_absolute():
            raise ValueError(f"given {name!r}, allowed: a name that makes a folder below run.root")
        return name

    @property
    def path(self) -> Path:
        """Run folder."""
        return self.dir if self.dir is not None else self.root / self.name


class DataConfig(Section):
    """Tokens of the run, their order and the number of epochs."""

    train: Location
    """Manifest of the training pool (`epochal data prepare` writes it), or a mix of several; path
    or http(s) or s3 URL."""
    validation: Location
    """Manifest of the validation pool; shares no document with the training pool."""
    tokenizer: Path
    """Tokenizer file with which the shards were written."""
    seq_length: PositiveInt = 1024
    """Tokens per sequence; sequences are views of the shards, so that a change needs no new
    tokenisation."""
    unique_tokens: PositiveInt | None = None
    """Number U of unique tokens, exact to the token; null takes the whole pool. Must be null for a
    mix, which has a budget for each source."""
    epochs: Annotated[float, Field(gt=0, le=1e6)] = 1.0
    """Number E of passes over the U tokens; fractions are allowed and reported."""
    order: Order = "global"
    """`global` (keyed permutation of the budget each epoch), `window(W)` or `sequential`."""
    documents: Literal["packed", "masked"] = "packed"
    """Attention across the documents of a sequence: `packed` allows it, `masked` does not."""
    verify: Literal["full", "size", "lazy", "off"] = "full"
    """Check of the shards before step 0: of every byte (`full`), of their sizes, or none (`off`).
    `lazy` checks (and downloads) a shard when it is first read."""
    cache: Path | None = None
    """Local folder for downloaded shards; null means `~/.cache/epochal/shards`."""
    cache_bytes: PositiveInt | None = None
    """Limit of that folder in bytes; null means none."""


class ParallelConfig(Section):
    """Layout of the run over ranks; the results do not depend on it."""

    data_parallel_size: PositiveInt | None = None
    """Data-parallel ranks; null means the world size divided by the other degrees (1 where
    `epochal train` starts the ranks)."""
    tensor_parallel_size: PositiveInt = 1
    pipeline_parallel_size: PositiveInt = 1
    context_parallel_size: PositiveInt = 1
    sequence_parallel: bool = False
    zero_stage: Annotated[int, Field(ge=0, le=3)] = 1
    offload: Literal["none", "cpu"] = "none"
    """`cpu` keeps optimizer state (at stage 3 also weights between their uses) in host memory and
    updates there; needs zero_stage 1 or higher."""
    overlap_comm: bool | None = None
    """Reduce gradients of ZeRO 1 to 3 during the backward pass. Null: at stage 3 only, see
    docs/performance.md. On a CPU the messages come in another order, without a gain."""
    hostfile: Path | None = None
    """Hostfile of the launcher of several machines; null trains on this machine."""
    threads_per_rank: PositiveInt | None = None
    """OMP_NUM_THREADS of each rank; null divides the cores of the machine."""
    timeout_minutes: Annotated[float, Field(gt=0)] = 30.0
    """Longest time of a collective in minutes; the run ends after it."""

    @property
    def layout(self) -> Layout:
        """Degrees of the layout; one data-parallel rank where their number is not known yet."""
        return Layout(
            self.tensor_parallel_size,
            self.pipeline_parallel_size,
            self.context_parallel_size,
            self.data_parallel_size or 1,
            self.sequence_parallel,
        )

    @property
    def degrees(self) -> dict[str, Any]:
        """Degrees of the layout, by the names of `Topology.build`'s arguments."""
        names = ("data", "tensor", "pipeline", "context")
        sizes = {f"{name}_parallel_size": getattr(self, f"{name}_parallel_size") for name in names}
        return sizes | {
            "sequence_parallel": self.sequence_parallel,
            "zero_stage": self.zero_stage,
        }


class TrainConfig(Section):
    """Training loop: batches, precision, memory, length, evaluations and checkpoints."""

    global_batch_size: PositiveInt = 256
    """Sequences per optimizer step, over all ranks."""
    micro_batch_size: PositiveInt | None = None
    """Sequences per rank and forward pass; null takes all sequences of a rank at once."""
    precision: Literal["float32", "bfloat16"] = "float32"
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Decay of the exponential moving average of the weights, e.g. 0.9999; 0 keeps none. It costs
    four bytes a parameter, sharded as the optimizer."""
    ema_warmup: bool = True
    """Let the decay grow as (1 + n) / (10 + n) over the first updates n, so that the initial
    weights leave the average soon."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Tensors that the backward pass recomputes instead of keeping them: with `selective` norms,
    rotations and activations (all of them cheap), with `full` whole layers (a third more
    operations, least memory)."""
    recompute_layers: PositiveInt | None = None
    """Number of layers of each pipeline stage, from its first, with recomputation; null all."""
    compile: Literal["auto"] | bool = False
    """torch.compile of each transformer layer; `auto` compiles on a GPU in bfloat16 where shapes
    stay the same, never on a CPU. It changes rounding, but neither names nor checkpoints."""
    compile_loss: bool = False
    """torch.compile of the training loss from the logits on: less memory and fewer passes in
    bfloat16. It changes the rounding of the loss, not of evaluation; not with tensor
    parallelism."""
    loss_chunk: Annotated[int, Field(ge=0)] | None = None
    """Number of rows of the head that are scored at once; 0 means all. Null means chunks of 256 MiB
    of logits on a GPU, and on a CPU where all logits together exceed 1 GiB."""
    stop_step: PositiveInt | None = None
    """Step at which this start stops before `data.epochs`; the schedule still spans all epochs."""
    log_interval: PositiveInt = 10
    eval_interval: Annotated[int, Field(ge=0)] = 0
    """Steps between evaluations during training; 0 evaluates at the end only."""
    eval_epochs: tuple[Annotated[float, Field(ge=0)], ...] = ()
    """Epochs of further evaluations, for curves that are dense at the start."""
    patience: Annotated[int, Field(ge=0)] = 0
    """Evaluations without improvement after which the run ends; 0 lets it go on."""
    min_delta: Annotated[float, Field(ge=0)] = 0.0
    """Decrease of the validation loss in nats per token that an improvement exceeds."""
    checkpoint_interval: Annotated[int, Field(ge=0)] = 0
    """Steps between checkpoints; 0 saves at the end and on preemption only."""
    async_checkpoint: bool = True
    """Write checkpoints in the background, so that a step waits only for a copy to host memory. The
    last checkpoint of a run, and one on preemption, are waited for."""
    keep_checkpoints: Annotated[int, Field(ge=0)] = 2
    """Number of newest other checkpoints that are kept; 0 keeps all."""
    keep_best: bool = False
    """Keep a checkpoint of the evaluation with the lowest loss too, in `RUN/best`."""
    checkpoint_epochs: tuple[Annotated[float, Field(gt=0)], ...] = ()
    """Epochs of checkpoints that are never removed; each is saved at the last step before it."""


class EvaluationConfig(Section):
    """Exact likelihood bound on validation sequences."""

    sequences: PositiveInt | None = None
    """Number of validation sequences, from the first; null takes all."""
    draws: PositiveInt = 1
    """Noise levels per sequence, stratified; the autoregressive likelihood needs none. With 1 the
    noise error is unknown."""
    batch_size: PositiveInt = 32
    """Sequences per forward pass and rank."""
    weights: Literal["ema", "raw", "both"] = "ema"
    """Weights that are evaluated in training where there is an average: `ema` the averaged ones,
    `raw` those of the last step, `both` also the latter, as `validation_raw/...`, at twice the
    cost."""


class Config(Section):
    """Whole configuration of a run, saved resolved as `config.yaml` in the run folder."""

    run: RunConfig = RunConfig()
    data: DataConfig
    model: ModelConfig = ModelConfig()
    objective: AnyObjective = objectives.make("autoregressive")
    optimizer: AnyOptimizer = optimizers.make("adamw")
    parallel: ParallelConfig = ParallelConfig()
    train: TrainConfig = TrainConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="after")
    def _sections_fit_together(self) -> Config:
        from pretrain.config.combinations import check_combinations

        check_combinations(self)
        return self

    @property
    def world_size(self) -> int:
        """Number of ranks of this configuration."""
        return self.parallel.layout.world_size

    @property
    def num_microbatches(self) -> int:
        """Number of forward passes per rank and optimizer step."""
        per_rank = self.train.global_batch_size // (self.parallel.data_parallel_size or 1)
        return per_rank // (self.train.micro_batch_size or per_rank)


def resolve(config: Config) -> Config:
    """Fill in the value that the first start of a run fixes: the time window n."""
    if config.objective.time_window is not None:
        return config
    window = config.train.global_batch_size
    objective = config.objective.model_copy(update={"time_window": window})
    return config.model_copy(update={"objective": objective})
