"""Rehearsal for `epochal train --dry-run`: what ranks check when they begin, without ranks.

It builds the parts whose settings only their implementations can judge, those of other packages
included, and holds the size of the model against the memory of this machine. It imports torch and
takes seconds, so that a real start leaves it to the ranks.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from cluster.machine import has_gpu
from pretrain.config.registry import Component
from pretrain.config.run import Config
from pretrain.errors import ConfigError, EpochalError

_BYTES_PER_PARAMETER = 16
"""Weight, gradient and two moments in 32 bits."""


def rehearse(config: Config) -> None:
    """Raise an error where ranks would refuse a configuration that passed preflight."""
    import torch

    from data_pipeline.tokenizer import load_tokenizer
    from pretrain.data import token_space
    from pretrain.model.attention.choice import Call, describe_kernels
    from pretrain.model.size import parameter_count, stage_costs
    from pretrain.objectives import build_objective

    on_gpu = config.run.device != "cpu" and has_gpu()
    space = token_space(load_tokenizer(config.data.tokenizer), config.model)
    objective = _built(
        config.objective,
        lambda: build_objective(config.objective, space, static_rows=on_gpu),
    )
    _built(config.optimizer, config.optimizer.spec)
    for tracker in config.tracking.services:
        _built(tracker, tracker.load)
    parameters = parameter_count(config.model, space.padded_vocab_size)
    parameters += objective.auxiliary_parameters(config.model, space.padded_vocab_size)
    if config.run.device == "cpu":  # else the ranks may run on other machines than this
        _check_memory(config, parameters)
        masked = config.data.documents == "masked"
        call = Call(
            "cpu",
            getattr(torch, config.train.precision),
            config.model.head_size,
            dropout=config.model.attention_dropout,
        )
        describe_kernels(config.model.attention, objective.attention_kinds(masked), call)
    stage_costs(config.model, space.padded_vocab_size, objective.head_share)


def _built(settings: Component, build: Callable[[], Any]) -> Any:
    """The result of `build`; ConfigError where the implementation refuses its settings."""
    try:
        return build()
    except EpochalError:
        raise
    except Exception as error:  # another package's implementation may raise anything
        raise ConfigError(
            f"{settings.name} ({type(settings).implementation}) cannot be used with its settings: "
            f"{type(error).__name__}: {error}"
        ) from error


def _check_memory(config: Config, parameters: int) -> None:
    """Raise ConfigError for a model that this machine cannot hold, sharded or not."""
    if config.parallel.hostfile is not None:
        return
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    needed = parameters * _BYTES_PER_PARAMETER
    if needed > memory:
        raise ConfigError(
            f"the model has {parameters:,} parameters, whose training takes {needed / 1e9:,.0f} GB "
            f"and more; this machine has {memory / 1e9:,.0f} GB. Lower model.*, or see `epochal "
            "plan` for machines that can train it"
        )
