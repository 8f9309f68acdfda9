"""Checks of settings that are legal alone but not together, made when a configuration is read.

Layouts have further rules in `parallel.layout.rules`. `pretrain.config.preflight` has the checks
that depend on the machine. Free of torch, as the configuration is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from parallel.errors import LayoutError
from parallel.layout.rules import check_rules, check_sizes, split_batch
from pretrain.config.kernels import check_attention
from pretrain.training.compilation import conflict, loss_conflict

if TYPE_CHECKING:
    from pretrain.config.run import Config


def check_combinations(config: Config) -> None:
    """Raise ValueError for the first impossible combination, with the values that are allowed."""
    _check_start(config)
    _check_layout(config)
    check_attention(config, "run.device is cpu" if config.run.device == "cpu" else None)
    _check_convolution(config)
    _check_recompute(config)
    _check_compile(config)
    config.objective.check(config)


def _check_start(config: Config) -> None:
    branch, weights = config.run.branch_from, config.run.init_from
    if branch is not None and weights is not None:
        raise ValueError(
            f"run.branch_from {branch} and run.init_from {weights} are both given: a branch starts "
            "with the weights of its checkpoint; set one of them to null"
        )
    if branch is None and config.run.branch_sha256 is not None:
        raise ValueError(
            "run.branch_sha256 is given without run.branch_from; give both, or set it to null"
        )


def _check_layout(config: Config) -> None:
    """Raise ValueError where `parallel.layout.rules` refuse the layout, the model or the batch."""
    p, m, t = config.parallel, config.model, config.train
    sizes = {
        "model.num_attention_heads": m.num_attention_heads,
        "model.num_query_groups": m.query_groups,
        "model.ffn_hidden_size": m.ffn_size,
        "model.vocab_multiple": m.vocab_multiple,
    }
    try:
        check_rules(p.layout, p.zero_stage, t.precision, p.offload, p.overlap_comm)
        check_sizes(p.layout, sizes, m.query_groups, m.num_layers, config.data.seq_length)
        split_batch(t.global_batch_size, t.micro_batch_size, p.layout.data_parallel_size)
    except LayoutError as error:
        raise ValueError(str(error)) from None


def _check_convolution(config: Config) -> None:
    kernel, objective, p = config.model.short_convolution, config.objective, config.parallel
    if kernel == 0:
        return
    named = f"model.short_convolution {kernel}"
    if objective.convolution == "refused":
        raise ValueError(
            f"{named} cannot be used with objective {objective.name}, whose tokens have their "
            "neighbours in another part of the sequence; set model.short_convolution to 0"
        )
    if objective.convolution == "symmetric" and kernel % 2 == 0:
        raise ValueError(
            f"{named} has no centre, but objective {objective.name} reads both sides of a token; "
            f"take an odd number, e.g. {kernel + 1}"
        )
    for name, given, allowed in (
        ("context_parallel_size", p.context_parallel_size, 1),
        ("sequence_parallel", p.sequence_parallel, False),
    ):
        if given != allowed:
            raise ValueError(
                f"{named} needs parallel.{name} {str(allowed).lower()}, not {str(given).lower()}: "
                "neighbours of a token would be on another rank"
            )


def _check_recompute(config: Config) -> None:
    mode, layers = config.train.recompute, config.train.recompute_layers
    if layers is None:
        return
    if mode == "none":
        raise ValueError(
            f"train.recompute_layers {layers} has no effect while train.recompute is none; set "
            "that to selective or full, or leave train.recompute_layers empty"
        )
    if layers > config.model.num_layers:
        raise ValueError(
            f"train.recompute_layers {layers} is more than model.num_layers "
            f"{config.model.num_layers}; leave it empty for all layers"
        )


def _check_compile(config: Config) -> None:
    obstacle = conflict(config) if config.train.compile is True else None
    if obstacle is not None:
        raise ValueError(
            f"train.compile true is unavailable while {obstacle}; change that, or set "
            "train.compile to auto or false"
        )
    obstacle = loss_conflict(config) if config.train.compile_loss else None
    if obstacle is not None:
        raise ValueError(
            f"train.compile_loss true is unavailable while {obstacle}; change that, or set "
            "train.compile_loss to false"
        )
