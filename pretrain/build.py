"""Module, teacher and engine settings of a configuration."""

from __future__ import annotations

from typing import Any

from parallel.engine.base import Engine, EngineConfig
from parallel.layout.rules import split_batch
from parallel.layout.topology import Topology
from pretrain.config.run import Config
from pretrain.model.initialize import initialize
from pretrain.model.recompute import Recompute
from pretrain.model.size import stage_costs
from pretrain.model.teacher import Teacher
from pretrain.model.transformer import Transformer
from pretrain.module import ObjectiveModule
from pretrain.objectives import Objective


def build_model(config: Config, topology: Topology, objective: Objective) -> ObjectiveModule:
    """The initialised module of a configuration, on the CPU; in a pipeline this rank's stage."""
    layers, head = stage_costs(
        config.model, objective.space.padded_vocab_size, objective.head_share
    )
    stage = topology.stage(layers, last_cost=head)
    recompute = Recompute(config.train.recompute, config.train.recompute_layers)
    model = Transformer(
        config.model, objective.space, topology, stage, recompute, _looks_back(objective)
    )
    initialize(model, config.run.seed)
    train = config.train
    return ObjectiveModule(model, objective, config.run.seed, train.loss_chunk, train.compile_loss)


def add_teacher(config: Config, engine: Engine, module: ObjectiveModule, device: Any) -> None:
    """Give the objective the frozen copy of the model that it learns from, if it does."""
    if module.objective.teacher:
        model = Transformer(
            config.model,
            module.objective.space,
            engine.topology,
            causal=_looks_back(module.objective),
        )
        module.teacher = Teacher(model.to(device))
        module.teacher.renew(module.model)
        engine.teacher = module.teacher.parameters


def _looks_back(objective: Objective) -> bool:
    """True where short convolutions read the tokens before, as attention does."""
    return objective.config.convolution == "causal"


def engine_config(config: Config, topology: Topology) -> EngineConfig:
    """The engine's part of the configuration, for the ranks that are really there."""
    train = config.train
    micro, count = split_batch(
        train.global_batch_size, train.micro_batch_size, topology.data_parallel_size
    )
    return EngineConfig(
        optimizer=config.optimizer.spec(),
        zero_stage=config.parallel.zero_stage,
        offload=config.parallel.offload,
        overlap_comm=config.parallel.overlap_comm,
        precision=train.precision,
        micro_batch_size=micro,
        num_microbatches=count,
        clip_grad_norm=config.optimizer.clip_grad_norm,
        ema_decay=train.ema_decay,
        ema_warmup=train.ema_warmup,
    )
