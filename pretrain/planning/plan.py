"""`epochal plan`: memory, time and cost of a configuration on a machine, and better layouts.

`pretrain.planning.cost` turns a `Config` into numbers; everything after that is arithmetic in
`parallel.planner`. The objective is built, because it declares its share of scored positions and
its attention rules: a new family needs no change here.
"""

from __future__ import annotations

from dataclasses import dataclass

from parallel.layout.rules import check_layout, split_batch
from parallel.planner.candidate import Candidate
from parallel.planner.costs import ModelCost
from parallel.planner.machine import Machine
from parallel.planner.plan import Plan, Search, Space, estimate, search
from pretrain.config.run import Config
from pretrain.errors import ConfigError
from pretrain.planning.cost import ObjectiveCost, model_cost
from pretrain.planning.machines import larger_machines, load_machine, sized
from pretrain.planning.remedies import Remedy, remedies

ASSUMED_VOCABULARY = 32_000


@dataclass(frozen=True)
class Planned:
    """Result of `plan`: the given layout and better ones."""

    config: Config
    machine: Machine
    model: ModelCost
    vocab_size: int
    vocabulary_assumed: bool
    """True where there was no tokenizer file to take the size from."""
    given: Plan
    found: Search
    remedies: tuple[Remedy, ...]
    """Changes that fit, where `given` does not."""
    tokens: float | None
    """Tokens to train on."""
    price: float | None
    """Price of a GPU-hour."""


def plan(
    config: Config,
    *,
    machine: str = "h100x8",
    num_gpus: int | None = None,
    tokens: float | None = None,
    price: float | None = None,
    vocab_size: int | None = None,
) -> Planned:
    """Estimate the configuration's layout and search for the best ones on the machine.

    Raises ConfigError and LayoutError for anything that cannot be planned; uses no device.
    """
    whole = load_machine(machine)
    available = sized(whole, num_gpus)
    for option, value in (("--tokens", tokens), ("--price-per-gpu-hour", price)):
        if value is not None and not value > 0:
            raise ConfigError(f"{option} is {value:g}; it must be larger than 0")
    size, assumed = vocabulary(config, vocab_size)
    model, space = costs(config, size), search_space(config, available)
    given = estimate(model, given_candidate(config, model, available.num_gpus), available)
    found = search(model, available, space)
    return Planned(
        config=config,
        machine=available,
        model=model,
        vocab_size=size,
        vocabulary_assumed=assumed,
        given=given,
        found=found,
        remedies=remedies(model, whole, space, given, found, larger_machines(available)),
        tokens=tokens,
        price=price,
    )


def search_space(config: Config, machine: Machine) -> Space:
    """Space of layouts for this configuration."""
    return Space(
        num_gpus=machine.num_gpus,
        global_batch_size=config.train.global_batch_size,
        precision=config.train.precision,
        optimizer=config.optimizer.spec(),
        averages=1 if config.train.ema_decay > 0 else 0,
        offload=config.parallel.offload,
    )


def costs(config: Config, vocab_size: int) -> ModelCost:
    """Numbers of the configuration for the planner."""
    padded = config.model.padded_vocab_size(vocab_size)
    return model_cost(config, padded, objective_cost(config, vocab_size))


def vocabulary(config: Config, given: int | None) -> tuple[int, bool]:
    """Number of ids of the tokenizer; True where it is assumed, because the file is missing."""
    if given is not None:
        if given < 8:
            raise ConfigError(f"--vocab-size is {given}; it must be 8 or more")
        return given, False
    path = config.data.tokenizer
    if not path.exists():
        return ASSUMED_VOCABULARY, True
    from data_pipeline.tokenizer import load_tokenizer

    return load_tokenizer(path).vocab_size, False


def objective_cost(config: Config, vocab_size: int, on_gpu: bool = True) -> ObjectiveCost:
    """Properties that the configuration's objective declares, and those of its attention."""
    from pretrain.objectives import build_objective
    from pretrain.vocabulary import TokenSpace

    space = TokenSpace(vocab_size, config.model.padded_vocab_size(vocab_size), 0, 1, 2, (0, 1, 3))
    objective = build_objective(config.objective.model_copy(update={"time_window": 2}), space)
    kind = objective.attention_kinds(config.data.documents == "masked")[0]
    fast = kind in ("causal", "bidirectional")
    return ObjectiveCost(
        causal=objective.causal and kind != "columns",
        dense_mask=not fast and (config.model.attention == "sdpa" or not on_gpu),
        positions_per_token=objective.positions_per_token,
        head_share=objective.head_share,
        teacher=objective.teacher,
        on_gpu=on_gpu,
        extra_passes=objective.extra_passes,
        auxiliary=objective.auxiliary_size(config.model, space.padded_vocab_size),
    )


def given_candidate(config: Config, model: ModelCost, num_gpus: int) -> Candidate:
    """Layout of the configuration on these GPUs; raises LayoutError where it is illegal."""
    p, t = config.parallel, config.train
    layout = check_layout(
        world_size=num_gpus,
        **p.degrees,
        precision=t.precision,
        sizes=model.tensor_parallel_sizes,
        num_query_groups=model.key_value_heads,
        num_layers=model.num_layers,
        seq_length=config.data.seq_length,
    )
    micro, count = split_batch(t.global_batch_size, t.micro_batch_size, layout.data_parallel_size)
    return Candidate(
        layout=layout,
        zero_stage=p.zero_stage,
        micro_batch_size=micro,
        num_microbatches=count,
        optimizer=config.optimizer.spec(),
        precision=t.precision,
        recompute=t.recompute,
        recompute_layers=t.recompute_layers,
        averages=1 if t.ema_decay > 0 else 0,
        offload=p.offload,
        overlap_comm=p.overlap_comm,
    )
