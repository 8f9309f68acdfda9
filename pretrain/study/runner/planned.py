"""Planned runs: the cells of a study composed, checked and counted, before anything starts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pretrain.config.compose import compose, flatten, replace_values
from pretrain.config.groups import groups
from pretrain.config.preflight import preflight
from pretrain.config.run import Config, TrackingConfig
from pretrain.errors import ConfigError
from pretrain.model.size import parameter_count
from pretrain.study.runner.cells import FLOPS, Cell, cells_of, override_text, recipe
from pretrain.study.runner.changes import check_unchanged
from pretrain.study.runner.settings import Study

_MOST_PROBLEMS = 10
_MOST_EPOCHS = 1e6


@dataclass(frozen=True)
class Facts:
    """Values of a run that do not change while it trains, as the record of a study keeps them."""

    run: str
    configuration: str
    arm: str
    family: str
    seed: int
    axes: dict[str, Any]
    """Value of each axis; an option of a group by its name."""
    params: int
    params_non_embedding: int
    unique_tokens: int
    planned_epochs: float
    total_steps: int
    """Optimizer steps of the whole schedule."""
    last_step: int
    """Step at which the run ends unless its loss stops it: less than `total_steps` where a limit
    of FLOPs or tokens ends it."""
    tokens: float
    """Tokens processed at `last_step`."""
    ranks: int

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)

    @property
    def flops_6nd(self) -> float:
        """Training FLOPs 6 N D, embeddings in N."""
        return 6.0 * self.params * self.tokens


@dataclass(frozen=True)
class Planned:
    """One run that may start."""

    cell: Cell
    config: Config
    facts: Facts

    @property
    def name(self) -> str:
        """Name of the run."""
        return self.cell.name

    @property
    def folder(self) -> Path:
        """Run folder."""
        return self.config.run.path


def plan_runs(study: Study, folder: Path) -> list[Planned]:
    """Compose and check every run of a study below `folder`.

    Raises one ConfigError with a line for each problem, naming the runs that have it.
    """
    problems: dict[str, list[str]] = defaultdict(list)
    planned = []
    for cell in cells_of(study):
        try:
            planned.append(_plan(study, cell, folder))
        except Exception as error:
            if not hasattr(error, "exit_code"):
                raise
            problems[str(error)].append(cell.name)
    if problems:
        lines = [f"{_names(names)}: {text}" for text, names in problems.items()]
        more = len(lines) - _MOST_PROBLEMS
        if more > 0:
            lines[_MOST_PROBLEMS:] = [f"and {more} more problems"]
        raise ConfigError("\n".join(lines))
    return planned


def _names(names: list[str]) -> str:
    more = len(names) - 1
    return names[0] if not more else f"{names[0]} and {more} more run{'s' if more > 1 else ''}"


def _plan(study: Study, cell: Cell, folder: Path) -> Planned:
    config = compose([*cell.overrides, *_fixed(study, cell, folder)])
    if config.tracking.experiment == TrackingConfig().experiment:
        config = replace_values(config, {"tracking.experiment": study.name})
    config = _with_length(study, cell, config)
    check_unchanged(config)
    config = preflight(config)
    return Planned(cell, config, _facts(study, cell, config))


def _fixed(study: Study, cell: Cell, folder: Path) -> list[str]:
    """Overrides that the study sets for each of its runs."""
    fixed = [
        f"run.root={override_text(str(folder / 'runs'))}",
        f"run.name={override_text(cell.name)}",
        f"tracking.group={override_text(study.name)}",
    ]
    if study.stopping.patience:
        fixed += [
            f"train.patience={study.stopping.patience}",
            f"train.min_delta={study.stopping.min_delta!r}",
        ]
    return fixed


def _with_length(study: Study, cell: Cell, config: Config) -> Config:
    """Configuration with the epochs of its FLOP budget, and the step at which a limit ends it."""
    values: dict[str, Any] = {}
    params = parameters(config)[0]
    flops_per_token = 6.0 * params
    rules = study.stopping
    counted = study.flops_convention == "counted"
    if counted and (FLOPS in cell.axes or rules.max_flops is not None):
        flops_per_token = counted_flops_per_token(config)
    if FLOPS in cell.axes:
        epochs = cell.axes[FLOPS] / (flops_per_token * unique_tokens(config))
        if epochs > _MOST_EPOCHS:
            raise ConfigError(
                f"flops {cell.axes[FLOPS]:g} is {epochs:,.0f} epochs of {unique_tokens(config):,} "
                f"tokens; allowed: at most {_MOST_EPOCHS:,.0f}"
            )
        values["data.epochs"] = float(f"{epochs:.6g}")
    limits = [rules.max_tokens] if rules.max_tokens is not None else []
    limits += [rules.max_flops / flops_per_token] if rules.max_flops is not None else []
    if limits:
        step_tokens = config.train.global_batch_size * config.data.seq_length
        stop = max(1, int(min(limits) // step_tokens))
        values["train.stop_step"] = min(stop, config.train.stop_step or stop)
    return replace_values(config, values) if values else config


def _facts(study: Study, cell: Cell, config: Config) -> Facts:
    from data_pipeline.stream.budget import total_positions

    params, embeddings = parameters(config)
    unique, batch = unique_tokens(config), config.train.global_batch_size
    positions = total_positions(_sequences(config), config.data.epochs)
    total = -(-positions // batch)
    last = min(total, config.train.stop_step or total)
    share = min(1.0, last * batch / positions)
    return Facts(
        run=cell.name,
        configuration=cell.configuration,
        arm=recipe(cell, config.objective.name),
        family=config.objective.name,
        seed=config.run.seed,
        axes=_axis_values(cell, config),
        params=params,
        params_non_embedding=params - embeddings,
        unique_tokens=unique,
        planned_epochs=config.data.epochs,
        total_steps=total,
        last_step=last,
        tokens=share * config.data.epochs * unique,
        ranks=config.world_size,
    )


def _axis_values(cell: Cell, config: Config) -> dict[str, Any]:
    """Values as the configuration has them: the text 1e-3 of a YAML file is a number there."""
    resolved = flatten(config)
    named = {k for k, v in cell.axes.items() if k in groups() and isinstance(v, str)}
    return {
        key: value if key in named else resolved.get(key, value) for key, value in cell.axes.items()
    }


def parameters(config: Config) -> tuple[int, int]:
    """Number of parameters, and of those in embedding and head matrices."""
    from data_pipeline.tokenizer import load_tokenizer

    padded = config.model.padded_vocab_size(load_tokenizer(config.data.tokenizer).vocab_size)
    total = parameter_count(config.model, padded)
    if not config.objective.scores_in_chunks:  # only such a family may have a network of its own
        from pretrain.planning.plan import objective_cost

        network = objective_cost(config, padded).auxiliary
        total += 0 if network is None else network.parameters
    return total, padded * config.model.hidden_size * (1 if config.model.tie_embeddings else 2)


def counted_flops_per_token(config: Config) -> float:
    """Training FLOPs of a token with attention and head; imports torch."""
    from pretrain.planning.plan import costs, vocabulary

    return costs(config, vocabulary(config, None)[0]).flops_per_token


def unique_tokens(config: Config) -> int:
    """Number U of unique tokens of a configuration."""
    return sum(tokens for tokens, _ in _budgets(config))


def _sequences(config: Config) -> int:
    return sum(sequences for _, sequences in _budgets(config))


def _budgets(config: Config) -> list[tuple[int, int]]:
    """Unique tokens and sequences of each pool."""
    from data_pipeline.stream.budget import Budget
    from data_pipeline.stream.open_stream import read_pools

    d = config.data
    found = []
    for pool in read_pools(d.train, d.unique_tokens, d.order):
        held = pool.manifest.tokens
        budget = Budget(pool.unique_tokens, d.seq_length, held)
        found.append((pool.unique_tokens or held, budget.sequences))
    return found


def select(planned: Iterable[Planned], pattern: str | None) -> list[Planned]:
    """Runs whose name fits a pattern such as `masked*seed=1`, or contains it."""
    from fnmatch import fnmatchcase

    runs = list(planned)
    if pattern is None:
        return runs
    wild = pattern if any(c in pattern for c in "*?[") else f"*{pattern}*"
    chosen = [run for run in runs if fnmatchcase(run.name, wild)]
    if not chosen:
        raise ConfigError(f"--only {pattern!r} fits no run; the first is called {runs[0].name}")
    return chosen
