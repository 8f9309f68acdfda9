"""Planned runs: the cells of a study composed, checked and counted, before anything starts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pretrain.config.compose import compose, flatten, replace_values
from pretrain.config.groups import groups
from pretrain.config.preflight import has_checkpoint, preflight
from pretrain.config.run import Config, TrackingConfig
from pretrain.errors import ConfigError
from pretrain.study.runner.branches import TRUNK, Part, is_complete, split
from pretrain.study.runner.cells import FLOPS, Cell, cells_of, override_text, recipe
from pretrain.study.runner.changes import check_unchanged
from pretrain.study.runner.settings import Study
from pretrain.study.runner.sizes import (
    counted_flops_per_token,
    parameters,
    sequences,
    unique_tokens,
)

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
    trunk: bool = False
    """True for a run that is none of the study's, but the trunk of some of them."""
    shared_tokens: float = 0.0
    """Tokens that the trunk of a branch processes for it."""

    @property
    def spent_tokens(self) -> float:
        """Tokens that this training itself processes."""
        return self.tokens - self.shared_tokens

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)

    @property
    def flops_6nd(self) -> float:
        """Training FLOPs 6 N D that the run itself costs, embeddings in N."""
        return 6.0 * self.params * self.spent_tokens


@dataclass(frozen=True)
class Planned:
    """One run that may start."""

    cell: Cell
    config: Config
    facts: Facts
    origin: Path | None = None
    """Checkpoint of its trunk that a branch starts from."""

    @property
    def is_ready(self) -> bool:
        """True unless it waits for a checkpoint of its trunk."""
        origin = self.origin
        return origin is None or is_complete(origin) or has_checkpoint(self.folder)

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
            planned += _plan_cell(study, cell, folder)
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


def _plan_cell(study: Study, cell: Cell, folder: Path) -> list[Planned]:
    """The run of a cell; with `branches` its trunk and the run of each length."""
    branches = study.branches_of(cell.arm)
    if branches is None:
        return [_plan(study, cell, folder)]
    config = compose([*cell.overrides, *_fixed(study, cell, folder)])
    parts = split(
        branches,
        sequences_per_epoch=sequences(config),
        batch_size=config.train.global_batch_size,
        warmup=config.optimizer.schedule.warmup,
    )
    trunk = folder.absolute() / "runs" / f"{cell.name},{TRUNK}"
    planned = []
    for part in parts.all:
        texts = [f"{key}={override_text(value)}" for key, value in part.overrides.items()]
        length = {} if part.is_trunk else {"data.epochs": part.overrides["data.epochs"]}
        own = replace(
            cell,
            name=f"{cell.name},{part.name}",
            configuration=f"{cell.configuration},{part.name}",
            axes={**cell.axes, **length},
            overrides=(*cell.overrides, *texts),
        )
        run = _plan(study, own, folder, part.origin(trunk))
        planned.append(replace(run, facts=_of_part(run.facts, part)))
    return planned


def _of_part(facts: Facts, part: Part) -> Facts:
    share = part.start / part.stop
    return replace(facts, trunk=part.is_trunk, shared_tokens=share * facts.tokens)


def _checked(config: Config, origin: Path | None) -> Config:
    """Preflight; a branch whose origin is still to come is checked without it."""
    if origin is None:
        return preflight(config)
    branch = replace_values(config, {"run.branch_from": str(origin)})
    check_unchanged(branch)
    if is_complete(origin) or has_checkpoint(config.run.path):
        return preflight(branch)
    return replace_values(preflight(config), {"run.branch_from": str(origin)})


def _plan(study: Study, cell: Cell, folder: Path, origin: Path | None = None) -> Planned:
    config = compose([*cell.overrides, *_fixed(study, cell, folder)])
    if config.tracking.experiment == TrackingConfig().experiment:
        config = replace_values(config, {"tracking.experiment": study.name})
    config = _with_length(study, cell, config)
    if origin is None:
        check_unchanged(config)
    config = _checked(config, origin)
    return Planned(cell, config, _facts(study, cell, config), origin)


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
    positions = total_positions(sequences(config), config.data.epochs)
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
    known = groups()
    named = {k for k, v in cell.axes.items() if k in known and isinstance(v, str)}
    return {
        key: value if key in named else resolved.get(key, value) for key, value in cell.axes.items()
    }


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
