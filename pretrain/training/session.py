"""Parts of a running training, built once, so that cheap checks come before expensive ones.

The order is files, process group, model, checkpoint. The loop uses the attributes of `Session`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from data_pipeline.stream.cursor import Cursor
from data_pipeline.stream.loader import BudgetLoader
from data_pipeline.stream.mixture import MixtureStream
from data_pipeline.stream.stream import TokenBatch, TokenStream
from data_pipeline.tokenizer import load_tokenizer
from parallel.checkpoint import BackgroundSaver, save_checkpoint
from parallel.engine.base import Engine
from parallel.engine.build import build_engine
from parallel.layout.topology import Topology
from parallel.runtime import Runtime
from pretrain.batch import TrainBatch
from pretrain.build import add_teacher, build_model, engine_config
from pretrain.config.compose import flatten
from pretrain.config.run import Config
from pretrain.data import clean_batch, open_streams, token_space
from pretrain.evaluation.adaptation import adapt_objective
from pretrain.evaluation.likelihood import Likelihood, evaluate_likelihood
from pretrain.evaluation.text_bytes import TextBytes
from pretrain.model.attention import Call, describe_kernels
from pretrain.model.size import parameter_count
from pretrain.noise.key import NoiseKey
from pretrain.objectives import Objective, build_objective
from pretrain.study.flops import train_flops_per_token
from pretrain.training.boundaries import is_last_before, position_at
from pretrain.training.compilation import choose_compilation
from pretrain.training.learning_rate import learning_rate, warmup_positions
from pretrain.training.parameter_groups import parameter_groups
from pretrain.training.prefetch import PrefetchedBatches
from pretrain.training.restoring import begin
from pretrain.training.state import Origin, TrainState


@dataclass
class Session:
    """Parts of one running training, connected to each other."""

    config: Config
    runtime: Runtime
    topology: Topology
    train_stream: TokenStream | MixtureStream
    validation: TokenStream
    text_bytes: TextBytes
    """Counter of the bytes of validation text, for bits per byte."""
    objective: Objective
    engine: Engine
    state: TrainState
    warmup: float
    """Length of the warm-up in sample positions, fixed by the first start of the run."""
    flops_per_token: float
    attention_kernel: str
    compilation: str
    """Description of the choice to compile layers, with the reason where they are not."""
    num_parameters: int
    resumed_from: Path | None = None
    origin: Origin | None = None
    """Checkpoint of another run from which this one branched off."""
    saver: BackgroundSaver = field(default_factory=BackgroundSaver)

    @property
    def checkpoints(self) -> Path:
        """Folder of this run's checkpoints."""
        return self.config.run.path / "checkpoints"

    @property
    def stop_position(self) -> int:
        """Position at which this process stops."""
        end = self.train_stream.total_positions
        stop_step = self.config.train.stop_step
        if stop_step is None:
            return end
        left = max(0, stop_step - self.state.step) * self.config.train.global_batch_size
        return min(end, self.state.position + left)

    @property
    def is_kept_place(self) -> bool:
        """True where a checkpoint of the present state is one of `train.checkpoint_epochs`."""
        stream, train = self.train_stream, self.config.train
        return is_last_before(
            self.state.position,
            [position_at(epoch, stream.sequences_per_epoch) for epoch in train.checkpoint_epochs],
            batch_size=train.global_batch_size,
            total_positions=stream.total_positions,
        )

    def steps_at(self, position: int) -> int:
        """Number of optimizer steps at `position`, with the current batch size."""
        left = position - self.state.position
        return self.state.step + -(-left // self.config.train.global_batch_size)

    def loader(self) -> BudgetLoader:
        """Loader of global batches from the current position on."""
        size = self.config.train.global_batch_size
        return BudgetLoader(
            self.train_stream,
            global_batch_size=size,
            micro_batch_size=self.engine.config.micro_batch_size,
            dp_rank=self.topology.dp_rank,
            dp_size=self.topology.data_parallel_size,
            start_position=self.state.position,
        )

    def noise(self, position: torch.Tensor) -> NoiseKey:
        """Noise key of the run at global positions."""
        return NoiseKey(self.config.run.seed, position)

    @contextmanager
    def batches(self) -> Iterator[PrefetchedBatches]:
        """Training batches on the device from the current position on, prefetched by one step."""
        with self.loader() as loader:
            yield PrefetchedBatches(loader, self.training_batch, lambda: self.objective.state)

    def training_batch(self, tokens: TokenBatch) -> TrainBatch:
        """Corrupt clean tokens by the objective, and add the key of the dropout masks."""
        clean = clean_batch(tokens)
        noise = self.noise(clean.position)
        batch = self.objective.corrupt(clean, noise)
        return replace(batch, dropout_seed=noise.number("dropout")).to(self.runtime.device)

    def learning_rate(self, position: int) -> float:
        """Learning rate of the step that ends at `position`."""
        return learning_rate(
            self.config.optimizer,
            position=position,
            total_positions=self.train_stream.total_positions,
            warmup=self.warmup,
        )

    def renew_teacher(self) -> None:
        """Copy the current weights to the teacher where a round of distillation begins."""
        if self.objective.teacher and self.objective.begins_round(self.state.position):
            module: Any = self.engine.module
            module.teacher.renew(module.model)

    def evaluate(self, interrupted: Callable[[], bool] = lambda: False) -> dict[str, Likelihood]:
        """Evaluate the exact bound of the validation text; the keys are prefixes of metrics.

        `validation` is measured with the averaged weights where there are any, unless
        `evaluation.weights` is `raw`; `validation_raw`, in addition to it, with the raw weights.
        `interrupted` is asked before each batch; InterruptedEvaluation where it says so.
        """
        chosen = self.config.evaluation.weights
        if self.engine.average is None or chosen == "raw":
            return {"validation": self._likelihood(interrupted)}
        with self.engine.using_ema():
            found = {"validation": self._likelihood(interrupted)}
        if chosen == "both":
            found["validation_raw"] = self._likelihood(interrupted)
        return found

    def _likelihood(self, interrupted: Callable[[], bool]) -> Likelihood:
        return evaluate_likelihood(
            self.objective,
            self.validation,
            self.engine.evaluate,
            self.config.evaluation,
            self.text_bytes,
            device=self.runtime.device,
            dp_rank=self.topology.dp_rank,
            dp_size=self.topology.data_parallel_size,
            dp_group=self.topology.dp_group,
            interrupted=interrupted,
        )

    def adapt(self, interrupted: Callable[[], bool] = lambda: False) -> None:
        """Let an adaptive objective adapt to the current weights, the same on every rank."""
        if self.objective.adapts:
            adapt_objective(
                self.objective,
                self.validation,
                self.engine.evaluate,
                self.config,
                device=self.runtime.device,
                dp_rank=self.topology.dp_rank,
                dp_size=self.topology.data_parallel_size,
                dp_group=self.topology.dp_group,
                interrupted=interrupted,
            )

    def save(self) -> Path:
        """Write a checkpoint of the current state; raises SaveError, and then keeps older ones."""
        return save_checkpoint(self.engine, *self._saved(), forever=self.is_kept_place)

    def save_in_background(self) -> None:
        """Begin to write a checkpoint of the current state; `saver.finish` has the outcome."""
        self.saver.save(self.engine, *self._saved(), forever=self.is_kept_place)

    def _saved(self) -> tuple[Path, int, dict[str, Any], int]:
        """Folder, step, state and number of checkpoints, as both ways of saving take them."""
        keep = self.config.train.keep_checkpoints
        return self.checkpoints, self.state.step, self.saved_state(), keep

    def saved_state(self) -> dict[str, Any]:
        """State of a checkpoint beside its tensors, as JSON; `restoring` reads it."""
        tokenizer = self.validation.pool.manifest.tokenizer.model_dump()
        origin = {} if self.origin is None else {"origin": self.origin.to_dict()}
        return origin | {
            "train": self.state.to_dict(),
            "cursor": Cursor.at(self.train_stream, self.state.position).to_dict(),
            "config": flatten(self.config),
            "objective": self.objective.state,
            "schedule": {"warmup_positions": self.warmup},
            "tokenizer": {
                key: tokenizer[key] for key in ("kind", "sha256", "pieces_sha256", "vocab_size")
            },
        }


def open_session(config: Config, runtime: Runtime) -> Session:
    """Build all parts; restore the newest checkpoint of the run, or that which it branches from.

    Raises user errors of `data_pipeline`, `parallel` and this package.
    """
    p = config.parallel
    train_stream, validation = open_streams(config, runtime.local_rank)
    tokenizer = load_tokenizer(config.data.tokenizer)
    topology = Topology.build(
        **p.degrees,
        precision=config.train.precision,
        timeout_minutes=p.timeout_minutes,
    )
    space = token_space(tokenizer, config.model)
    # Few distinct shapes avoid fragmentation and recompilation on a GPU; a CPU has neither problem.
    objective = build_objective(config.objective, space, static_rows=runtime.device.type == "cuda")
    kinds = objective.attention_kinds(config.data.documents == "masked")
    kernels = describe_kernels(
        config.model.attention,
        kinds,
        Call(
            runtime.device.type,
            getattr(torch, config.train.precision),
            config.model.head_size,
            dropout=config.model.attention_dropout,
        ),
    )
    module = build_model(config, topology, objective)
    compilation = choose_compilation(config, runtime.device.type, kinds)
    if compilation.on:
        module.model.compile_layers()
    engine = build_engine(
        module.to(runtime.device),
        parameter_groups(module, config.optimizer),
        engine_config(config, topology),
        topology,
    )
    add_teacher(config, engine, module, runtime.device)
    session = Session(
        config=config,
        runtime=runtime,
        topology=topology,
        train_stream=train_stream,
        validation=validation,
        text_bytes=TextBytes(tokenizer),
        objective=objective,
        engine=engine,
        state=TrainState(),
        warmup=warmup_positions(
            config.optimizer.schedule,
            total_positions=train_stream.total_positions,
            batch_size=config.train.global_batch_size,
        ),
        flops_per_token=train_flops_per_token(
            config.model,
            space.padded_vocab_size,
            config.data.seq_length,
            causal=objective.causal,
            head_share=objective.head_share,
            positions_per_token=objective.positions_per_token,
            extra_passes=objective.extra_passes,
        ),
        attention_kernel=kernels,
        compilation=compilation.description,
        num_parameters=parameter_count(config.model, space.padded_vocab_size)
        + objective.auxiliary_parameters(config.model, space.padded_vocab_size),
    )
    begin(session)
    return session
