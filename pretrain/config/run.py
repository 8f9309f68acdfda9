"""One typed tree of settings. Hydra composes it (`pretrain.config.compose`), pydantic validates it
here.

Every field says what it means below it; unknown keys are refused. What is learned (transformer and
objective) stands in `pretrain.config.model`, the rest here. Checks of one section stand beside it,
those between sections in `pretrain.config.combinations`; checks against files (budget against pool,
tokenizer against shards) live in `pretrain.config.preflight`. Free of torch, so that the command
line can validate in milliseconds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from pretrain.config.model import ModelConfig
from pretrain.config.objectives import AnyObjective, ObjectiveConfig, objectives
from pretrain.config.optimizers import (
    AnyOptimizer,
    OptimizerConfig,
    ScheduleConfig,
    optimizers,
)
from pretrain.config.registry import Registry
from pretrain.config.trackers import AnyTracker, MlflowConfig, TrackerConfig, checked_uri
from pretrain.config.types import Location, PositiveInt, Section

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
"""Sections whose class is chosen by their `name`."""


class RunConfig(Section):
    """Where the run lives and what makes it repeatable."""

    name: str = "run"
    """Shown in MLflow and on the console; also the folder below `root` when `dir` is not given,
    therefore not empty and without `..`."""
    root: Path = Path("runs")
    dir: Path | None = None
    """Folder of this run: configuration, checkpoints, logs. Default: `root`/`name`."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 17
    """Seed of weights, noise, order and dropout: the whole run is a function of it."""
    init_from: Path | None = None
    """Safetensors file whose weights the run starts with, e.g. one of `epochal export`; null
    initialises from the seed. Names and shapes must be those of the model."""
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
        """The run folder."""
        return self.dir if self.dir is not None else self.root / self.name


class DataConfig(Section):
    """Which tokens the run sees, how often and in which order."""

    train: Location
    """Manifest of the training pool (`epochal data prepare` writes it), or a mix of several; path
    or http(s) or s3 URL."""
    validation: Location
    """Manifest of the validation pool; shares no document with the training pool."""
    tokenizer: Path
    """Tokenizer file that the shards were written with."""
    seq_length: PositiveInt = 1024
    """Tokens per sequence; a view of the shards, changing it needs no re-tokenising."""
    unique_tokens: PositiveInt | None = None
    """U, exact to the token; null takes the whole pool. A mix holds its own budgets: null."""
    epochs: Annotated[float, Field(gt=0, le=1e6)] = 1.0
    """E, how often the U tokens are seen; fractions are allowed and reported."""
    order: str = "global"
    """`global` (keyed permutation of the budget each epoch), `window(W)` or `sequential`."""
    documents: Literal["packed", "masked"] = "packed"
    """`packed` attends across documents, `masked` keeps them apart."""
    verify: Literal["full", "size", "lazy", "off"] = "full"
    """How thoroughly shards are checked before step 0; `lazy` checks (and fetches) them when they
    are first read."""
    cache: Path | None = None
    """Folder of this machine for shards behind URLs; null means `~/.cache/epochal/shards`."""
    cache_bytes: PositiveInt | None = None
    """Limit of that folder; null means none."""


class ParallelConfig(Section):
    """How the run is cut over ranks; never changes what it computes."""

    data_parallel_size: PositiveInt | None = None
    """Null: the world size divided by the other degrees (1 when `epochal train` launches)."""
    tensor_parallel_size: PositiveInt = 1
    pipeline_parallel_size: PositiveInt = 1
    context_parallel_size: PositiveInt = 1
    sequence_parallel: bool = False
    zero_stage: Annotated[int, Field(ge=0, le=3)] = 1
    offload: Literal["none", "cpu"] = "none"
    """`cpu` keeps optimizer state (at stage 3 also weights between their uses) in host memory and
    updates there; needs zero_stage 1 or higher."""
    overlap_comm: bool | None = None
    """Reduce gradients of ZeRO 1 to 3 while the backward pass goes on. Null: at stage 3 only, see
    docs/performance.md. On a CPU the same messages in another order, and no gain."""
    hostfile: Path | None = None
    """Hosts for the DeepSpeed launcher; null trains on this machine."""
    threads_per_rank: PositiveInt | None = None
    """OMP_NUM_THREADS of each rank; null divides the cores of the machine."""
    timeout_minutes: Annotated[float, Field(gt=0)] = 30.0
    """Collectives that take longer end the run."""

    @property
    def degrees(self) -> dict[str, Any]:
        """The degrees of the layout, by the names that `Topology.build` takes."""
        names = ("data", "tensor", "pipeline", "context")
        sizes = {f"{name}_parallel_size": getattr(self, f"{name}_parallel_size") for name in names}
        return sizes | {
            "sequence_parallel": self.sequence_parallel,
            "zero_stage": self.zero_stage,
        }


class TrainConfig(Section):
    """The loop: batches, precision, how far, and what happens on the way."""

    global_batch_size: PositiveInt = 256
    """Sequences per optimizer step, over all ranks."""
    micro_batch_size: PositiveInt | None = None
    """Sequences per rank and forward pass; null takes the whole share of a rank at once."""
    precision: Literal["float32", "bfloat16"] = "float32"
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Decay of the exponential moving average of the weights, e.g. 0.9999; 0 keeps none. Costs four
    bytes a parameter, sharded as the optimizer."""
    ema_warmup: bool = True
    """Let the decay grow as (1 + n) / (10 + n) over the first updates n, so that the average
    forgets the random start."""
    recompute: Literal["none", "selective", "full"] = "none"
    """What the backward pass makes again instead of keeping it: `selective` norms, rotations and
    activations (nothing dear), `full` whole layers (a third more operations, least memory)."""
    recompute_layers: PositiveInt | None = None
    """How many layers of each pipeline stage, from its first, `recompute` concerns; null all."""
    compile: Literal["auto"] | bool = False
    """torch.compile of each transformer layer; `auto` on a GPU in bfloat16 where its shapes stay
    the same, never on a CPU. Changes rounding, neither names nor checkpoints. Off by default."""
    compile_loss: bool = False
    """torch.compile of the training loss from the logits on: in bfloat16 less memory and fewer
    passes. Changes rounding; evaluation stays as it is. Not with tensor parallelism."""
    loss_chunk: Annotated[int, Field(ge=0)] | None = None
    """Rows of the head that are scored at once; 0 scores all. Null: chunks of 256 MiB of logits on
    a GPU, and on a CPU where all logits together exceed 1 GiB."""
    stop_step: PositiveInt | None = None
    """Stop here although `data.epochs` goes further (the schedule still spans all epochs)."""
    log_interval: PositiveInt = 10
    eval_interval: Annotated[int, Field(ge=0)] = 0
    """Steps between evaluations during training; 0 evaluates at the end only."""
    eval_epochs: tuple[Annotated[float, Field(ge=0)], ...] = ()
    """Further evaluations at these epochs (curves that are dense at the start need them)."""
    checkpoint_interval: Annotated[int, Field(ge=0)] = 0
    """Steps between checkpoints; 0 saves at the end and on preemption only."""
    async_checkpoint: bool = True
    """Write checkpoints on the way in the background: the step pays for a copy into host memory
    only. The last one of a run, and one on preemption, is waited for."""
    keep_checkpoints: Annotated[int, Field(ge=0)] = 2
    """How many checkpoints stay; 0 keeps all."""


class EvaluationConfig(Section):
    """Exact likelihood bound on validation sequences."""

    sequences: PositiveInt | None = None
    """How many validation sequences, from the first; null takes all."""
    draws: PositiveInt = 1
    """Noise levels per sequence, stratified; the autoregressive likelihood needs none."""
    batch_size: PositiveInt = 32
    """Sequences per forward pass and rank."""
    weights: Literal["ema", "raw", "both"] = "ema"
    """What is evaluated while training where there is an average: `ema` the averaged weights, `raw`
    the present ones, `both` also the present ones, as `validation_raw/...`, at twice the cost."""


class TrackingConfig(Section):
    """Services that get the measurements. JSONL in the run folder is always written."""

    mlflow: bool = True
    uri: str | None = None
    """MLflow server; null takes the sqlite file of `run.root`."""
    experiment: str = "epochal"
    trackers: tuple[AnyTracker, ...] = ()
    """Further services, each with its `name` and its settings."""
    queue_size: PositiveInt = 10000
    """Measurements kept while a service does not answer; older ones are dropped and counted."""

    @field_validator("uri")
    @classmethod
    def _has_a_known_scheme(cls, uri: str | None) -> str | None:
        return checked_uri(uri)

    @field_validator("trackers")
    @classmethod
    def _are_different(cls, given: tuple[TrackerConfig, ...]) -> tuple[TrackerConfig, ...]:
        names = [tracker.name for tracker in given]
        if len({*names, "mlflow"}) <= len(names):
            raise ValueError(
                f"given {', '.join(names)}, allowed: every tracker once; MLflow is set up by "
                "tracking.mlflow, tracking.uri and tracking.experiment"
            )
        return given

    @property
    def services(self) -> tuple[TrackerConfig, ...]:
        """Settings of every tracker of the run."""
        ours = MlflowConfig(uri=self.uri, experiment=self.experiment)
        return (*((ours,) if self.mlflow else ()), *self.trackers)


class Config(Section):
    """The whole configuration of a run; saved resolved as `config.yaml` in the run folder."""

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
        """Ranks that this configuration runs on."""
        p = self.parallel
        return (
            (p.data_parallel_size or 1)
            * p.tensor_parallel_size
            * p.pipeline_parallel_size
            * p.context_parallel_size
        )

    @property
    def num_microbatches(self) -> int:
        """Forward passes per rank and optimizer step."""
        per_rank = self.train.global_batch_size // (self.parallel.data_parallel_size or 1)
        return per_rank // (self.train.micro_batch_size or per_rank)


def resolve(config: Config) -> Config:
    """Fill in what the first start of a run decides once and for all: the time window n."""
    if config.objective.time_window is not None:
        return config
    window = config.train.global_batch_size
    objective = config.objective.model_copy(update={"time_window": window})
    return config.model_copy(update={"objective": objective})
