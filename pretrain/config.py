"""One typed tree of settings. Hydra composes it (`pretrain.compose`), pydantic validates it here.

Every field says what it means below it; unknown keys are refused. Checks that need only the
configuration live here; checks against files (budget against pool, tokenizer against shards) live
in `pretrain.preflight`. Free of torch, so that the command line can validate in milliseconds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, model_validator

PositiveInt = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
OpenFraction = Annotated[float, Field(gt=0.0, lt=1.0)]
Temperature = Annotated[float, Field(ge=1e-6, le=1e3)]


def _location(value: Any) -> Path | str:
    """URLs stay text: as paths they would lose a slash."""
    from data_pipeline.remote import SCHEMES, is_remote

    if not isinstance(value, str | Path) or not str(value):
        raise ValueError(f"given {value!r}, allowed: a path or URL")
    if is_remote(value):
        return str(value)
    if "://" in str(value):
        raise ValueError(f"given {str(value)!r}, allowed: a path or {', '.join(SCHEMES)} URL")
    return Path(value)


Location = Annotated[Path | str, PlainValidator(_location)]
"""A path of this machine, or a URL."""


class Section(BaseModel):
    """Base of every group: frozen, and unknown keys are an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class RunConfig(Section):
    """Where the run lives and what makes it repeatable."""

    name: str = "run"
    """Shown in MLflow and on the console; also the folder below `root` when `dir` is not given."""
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
    epochs: Annotated[float, Field(gt=0)] = 1.0
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


class ModelConfig(Section):
    """Shape of the transformer; the same one for every objective."""

    num_layers: PositiveInt = 12
    hidden_size: PositiveInt = 768
    num_attention_heads: PositiveInt = 12
    num_query_groups: PositiveInt | None = None
    """Key/value heads (grouped-query attention); null means one for every attention head."""
    ffn_hidden_size: PositiveInt | None = None
    """Width of the MLP; null means 8/3 of `hidden_size`, down to a multiple of 64."""
    activation: Literal["swiglu", "squared_relu", "gelu"] = "swiglu"
    qk_norm: bool = False
    """RMSNorm on queries and keys, per head."""
    tie_embeddings: bool = True
    """Share the embedding matrix with the head."""
    time_conditioning: bool = False
    """adaLN modulation by the noise level (uniform-state objectives need it)."""
    rope_base: Annotated[float, Field(gt=0)] = 10000.0
    norm_eps: Annotated[float, Field(gt=0)] = 1e-5
    init_std: Annotated[float, Field(gt=0)] = 0.02
    """Standard deviation of initial weights; output projections are scaled by 1/sqrt(2
    num_layers)."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Probability of dropping an element of the embeddings and of what attention and MLP add to the
    residual stream, while training."""
    attention_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Probability of dropping an attention weight, while training."""
    vocab_multiple: PositiveInt = 128
    """The embedding is padded to a multiple of this, whatever the tensor-parallel size."""
    attention: Literal["auto", "sdpa", "flash", "flex"] = "auto"
    """Attention kernel: `flash` (flash-attn, NVIDIA), `sdpa` (torch, everywhere), `flex` (torch's
    FlexAttention, GPU). `auto` takes the fastest that can compute the rule at hand."""

    @model_validator(mode="after")
    def _shape_divides(self) -> ModelConfig:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not divisible by num_attention_heads "
                f"{self.num_attention_heads}"
            )
        if self.head_size % 2:
            raise ValueError(f"head size {self.head_size} is odd; rotary embedding needs pairs")
        if self.num_attention_heads % self.query_groups:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not divisible by "
                f"num_query_groups {self.query_groups}"
            )
        return self

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def query_groups(self) -> int:
        """Number of key/value heads."""
        return self.num_query_groups or self.num_attention_heads

    @property
    def ffn_size(self) -> int:
        """Width of the MLP with the default filled in."""
        return self.ffn_hidden_size or max(64, 8 * self.hidden_size // 3 // 64 * 64)

    def padded_vocab_size(self, vocab_size: int) -> int:
        """Rows of the embedding for a tokenizer of `vocab_size` ids."""
        return -(-vocab_size // self.vocab_multiple) * self.vocab_multiple


class ObjectiveConfig(Section):
    """What is trained. Families read the fields that concern them and refuse the others."""

    name: str = "autoregressive"
    """A name of the registry, e.g. `autoregressive` or `masked`."""
    time_window: PositiveInt | None = None
    """n: t is stratified over windows of n consecutive positions; null takes the global batch size
    of the first start, which is then recorded here."""
    loss: Literal["elbo", "simple", "dynamic"] = "elbo"
    """What is trained; the bound is always evaluated exactly. `elbo` is the exact bound. `simple`:
    masked, block and esoteric take plain cross-entropy on masked tokens, uniform on redrawn tokens,
    interpolating the unweighted bound. `dynamic`: GIDD's weights, for interpolating hybrid
    noise."""
    schedule: Literal["linear", "cosine", "log_linear"] = "linear"
    """masked, uniform: share of clean tokens over time."""
    random_length: Fraction = 0.0
    """masked, uniform, interpolating, gaussian: share of sequences cut to a random length while
    training."""
    ar_ratio: Fraction = 0.0
    """masked: share of sequences whose masks are moved to the end of the sequence."""
    noise: Literal["masked", "low_uniform", "balanced", "high_uniform", "uniform", "hybrid"] = (
        "balanced"
    )
    """interpolating: how <mask> and uniform noise mix; `hybrid` is the time form of GIDD."""
    uniform_share: Annotated[float, Field(ge=0, lt=1)] = 0.2
    """interpolating: p_u, the uniform share of `hybrid` noise at t = 1/2."""
    block_size: PositiveInt = 16
    """block: tokens of a block; 1 is autoregressive, the sequence length masked."""
    clip: tuple[Fraction, Fraction] = (0.0, 1.0)
    """block: interval of noise levels while training; the bound always uses all of them."""
    adapt_clip: bool = False
    """block: at every evaluation move `clip` to the interval of least measured variance."""
    alpha0: Fraction = 1.0
    """esoteric: share of tokens that diffusion fills in; the rest is filled left to right."""
    diffusion_share: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """esoteric: share of sequences that train the diffusion phase while 0 < alpha0 < 1."""
    orders: PositiveInt = 1
    """autoregressive: number of fixed token orders, drawn by sequence; the first is the text's."""
    order_kind: Literal["local", "random"] = "local"
    """autoregressive: `local` perturbs order i by a normal of i positions, `random` permutes."""
    hide: Literal["none", "queries", "tokens"] = "none"
    """autoregressive: hide past tokens from a query of its own (`queries`), or from all later
    ones (`tokens`)."""
    hide_share: Fraction = 0.25
    """autoregressive: share of positions that `hide` concerns."""
    independent_levels: Fraction = 0.0
    """interpolating: share of sequences in which every token draws its own noise level."""
    curriculum_sequences: Annotated[int, Field(ge=0)] = 0
    """uniform: the first so many sequences of the run are trained with Gaussian-softened inputs."""
    curriculum_temperature: tuple[Temperature, Temperature] = (1e-3, 1e-3)
    """uniform: softmax temperature at the beginning and at the end of the curriculum, log-linear
    between them; towards 0 inputs become tokens again."""
    curriculum_top_k: PositiveInt = 2
    """uniform: embeddings that a softened input is the sum of."""
    curriculum_interval: tuple[OpenFraction, OpenFraction] = (0.05, 0.95)
    """uniform: smallest and largest share of clean tokens (alpha) during the curriculum."""
    embedding_size: PositiveInt = 16
    """gaussian: dimensions of the embeddings that are noised."""
    end_points: tuple[float, float] = (-3.0, 6.0)
    """gaussian: log noise-to-signal ratio at t = 0 and t = 1 before training, which moves both."""
    self_conditioning: Annotated[float, Field(ge=0, lt=1)] = 0.25
    """gaussian: share of sequences that are told the estimate of a first pass while training;
    0 turns self-conditioning off, also in evaluation and sampling."""
    reconstruction_share: Annotated[float, Field(gt=0, lt=1)] = 0.125
    """gaussian: share of sequences that train the reconstruction at t = 0."""
    round_sequences: Annotated[int, Field(ge=0)] = 0
    """distillation: sequences of a round, after which the student becomes the teacher; a multiple
    of the global batch."""
    first_gap: Annotated[float, Field(gt=0, le=1)] = 1 / 512
    """distillation: difference of time between student and teacher in the first round; it doubles
    every round."""
    gap_interval: tuple[OpenFraction, OpenFraction] = (0.006, 0.9987)
    """distillation: smallest and largest share of clean tokens (alpha); time is even in the
    log-SNR of the Gaussian between them."""
    divergence: Literal["reverse", "forward"] = "reverse"
    """distillation: KL(student || teacher), or KL(teacher || student)."""

    @model_validator(mode="after")
    def _intervals_are_ordered(self) -> ObjectiveConfig:
        low, high = self.clip
        if not (low <= high and high > 0):
            raise ValueError(f"objective.clip {self.clip} must be [low, high] with low <= high > 0")
        for name in ("curriculum_interval", "gap_interval"):
            low, high = getattr(self, name)
            if low >= high:
                raise ValueError(
                    f"objective.{name} {(low, high)} must be [low, high] with low < high"
                )
        if not self.end_points[0] < self.end_points[1]:
            raise ValueError(
                f"objective.end_points {self.end_points} must rise: little noise, then much"
            )
        return self


class ScheduleConfig(Section):
    """Learning rate over the run, as a factor of `optimizer.lr`."""

    name: Literal["constant", "cosine", "wsd"] = "cosine"
    """Warm-up, then constant, cosine to `min_lr`, or stable and a final decay (wsd)."""
    warmup: Annotated[float, Field(ge=0)] = 0.01
    """Warm-up: below 1 a share of all steps, else a number of steps."""
    decay: Fraction = 0.2
    """wsd: share of all steps in which the rate falls to `min_lr`."""


class OptimizerConfig(Section):
    """AdamW with decay groups: matrices decay, norms and biases do not."""

    lr: Annotated[float, Field(gt=0)] = 3e-4
    min_lr: Annotated[float, Field(ge=0)] = 0.0
    """Absolute rate at the end of the decay."""
    betas: tuple[float, float] = (0.9, 0.95)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    decay_embeddings: bool = True
    """Whether the embedding matrix decays too."""
    clip_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    """Largest global gradient norm; 0 turns clipping off."""
    schedule: ScheduleConfig = ScheduleConfig()

    @model_validator(mode="after")
    def _min_below_peak(self) -> OptimizerConfig:
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr {self.min_lr} is larger than lr {self.lr}")
        return self


class ParallelConfig(Section):
    """How the run is cut over ranks; never changes what it computes."""

    data_parallel_size: PositiveInt | None = None
    """Null: the world size divided by the other degrees (1 when `epochal train` launches)."""
    tensor_parallel_size: PositiveInt = 1
    pipeline_parallel_size: PositiveInt = 1
    context_parallel_size: PositiveInt = 1
    sequence_parallel: bool = False
    zero_stage: Annotated[int, Field(ge=0, le=3)] = 1
    offload: Literal["none", "cpu", "nvme"] = "none"
    """`cpu` keeps optimizer state (at stage 3 also weights between their uses) in host memory and
    updates there; needs zero_stage 1 or higher. `nvme` keeps optimizer state in `offload_path` and
    the weights in host memory; needs zero_stage 3."""
    offload_path: Path | None = None
    """Folder on a fast disk of each node, for `offload: nvme`; every rank makes its own below."""
    hostfile: Path | None = None
    """Hosts for the DeepSpeed launcher; null trains on this machine."""
    threads_per_rank: PositiveInt | None = None
    """OMP_NUM_THREADS of each rank; null divides the cores of the machine."""
    timeout_minutes: Annotated[float, Field(gt=0)] = 30.0
    """Collectives that take longer end the run."""

    @property
    def degrees(self) -> dict[str, Any]:
        """What a layout is made of, by the names of `parallel.rules` and `Topology.build`."""
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
    loss_chunk: Annotated[int, Field(ge=0)] | None = None
    """Rows of the head that are scored at once; 0 scores all. Null: chunks of 256 MiB of logits on
    a GPU, and on a CPU where all logits together exceed 1 GiB."""
    stop_step: PositiveInt | None = None
    """Stop here although `data.epochs` goes further (the schedule still spans all epochs)."""
    log_interval: PositiveInt = 10
    eval_interval: Annotated[int, Field(ge=0)] = 0
    """Steps between evaluations during training; 0 evaluates at the end only."""
    eval_epochs: tuple[float, ...] = ()
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
    """Where measurements go. JSONL in the run folder is always written."""

    mlflow: bool = True
    uri: str | None = None
    """MLflow server; null takes the sqlite file of `run.root`."""
    experiment: str = "epochal"
    queue_size: PositiveInt = 10000
    """Measurements kept while the tracker does not answer; older ones are dropped and counted."""


class Config(Section):
    """The whole configuration of a run; saved resolved as `config.yaml` in the run folder."""

    run: RunConfig = RunConfig()
    data: DataConfig
    model: ModelConfig = ModelConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    parallel: ParallelConfig = ParallelConfig()
    train: TrainConfig = TrainConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="after")
    def _sections_fit_together(self) -> Config:
        from pretrain.combinations import check_combinations

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
