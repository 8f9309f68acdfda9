"""Cells of a study: the cross product of its axes, each cell one run with a readable name."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from pretrain.config.suggest import closest
from pretrain.errors import ConfigError
from pretrain.study.runner.settings import RESERVED, Study

FLOPS = "flops"
"""Axis of training budgets; its column in a table is `flops_budget`."""
SEED = "run.seed"
LENGTH = ("data.unique_tokens", "data.epochs", SEED, FLOPS)
"""Axes, beside those of the model, in which runs of one recipe may differ."""
_LONGEST_NAME = 150
_PLAIN = re.compile(r"[\w.+/-]+")
_UNSAFE = re.compile(r"[^\w.+=,-]+")


@dataclass(frozen=True)
class Cell:
    """One run of a study, not yet composed."""

    name: str
    """Name of the run and of its folder."""
    configuration: str
    """Name without the seed."""
    arm: str | None
    """Recipe; None in a study without recipes."""
    axes: dict[str, Any]
    """Value of each axis."""
    overrides: tuple[str, ...]
    """Overrides of the cell, those of the study and its recipe first."""


def cells_of(study: Study) -> list[Cell]:
    """All cells in the order of the file; raises ConfigError for names that collide."""
    cells = []
    for arm in study.arms or (None,):
        axes = _axes(study, arm)
        fixed = (*study.base, *(study.overrides_of(arm) if arm else ()))
        _check_reserved(fixed, axes)
        for values in itertools.product(*axes.values()):
            chosen = dict(zip(axes, values, strict=True))
            cells.append(_cell(arm, chosen, fixed))
    kept = _without_excluded(study, cells)
    names: dict[str, Cell] = {}
    for cell in kept:
        other = names.setdefault(cell.name, cell)
        if other is not cell:
            raise ConfigError(
                f"two runs would be called {cell.name}: {_describe(other)} and {_describe(cell)}; "
                "rename a recipe or change a value"
            )
    if not kept:
        raise ConfigError(f"the study {study.name} has no runs; `exclude` leaves all of them out")
    return kept


def _axes(study: Study, arm: str | None) -> dict[str, tuple[Any, ...]]:
    axes: dict[str, tuple[Any, ...]] = dict(study.grid)
    if arm is not None:
        axes |= study.arms[arm].grid
    return axes | ({FLOPS: study.flops} if study.flops is not None else {})


def _cell(arm: str | None, axes: dict[str, Any], fixed: tuple[str, ...]) -> Cell:
    texts = [f"{key}={override_text(value)}" for key, value in axes.items() if key != FLOPS]
    return Cell(
        name=run_name(arm, axes),
        configuration=run_name(arm, {k: v for k, v in axes.items() if k != SEED}),
        arm=arm,
        axes=axes,
        overrides=(*fixed, *texts),
    )


def run_name(arm: str | None, axes: Mapping[str, Any]) -> str:
    """Name of a run, safe as a folder: `AR-tuned,model=7m,unique_tokens=25000,seed=1`."""
    leaves = [key.rpartition(".")[2] for key in axes]
    parts = [] if arm is None else [arm]
    for (key, value), leaf in zip(axes.items(), leaves, strict=True):
        parts.append(f"{leaf if leaves.count(leaf) == 1 else key}={value_text(value)}")
    name = ",".join(_UNSAFE.sub("-", part).strip("-") for part in parts) or "run"
    if len(name) <= _LONGEST_NAME:
        return name
    digest = sha256(name.encode()).hexdigest()[:8]
    return f"{name[: _LONGEST_NAME - 9]}-{digest}"


def value_text(value: Any) -> str:
    """Text of a value in names and tables: 1e+18 as `1e18`, true as `true`."""
    if isinstance(value, bool) or value is None or isinstance(value, list | tuple | dict):
        return json.dumps(value)
    if isinstance(value, float):
        return f"{value:.12g}".replace("e+", "e")
    return str(value)


def override_text(value: Any) -> str:
    """Text of a value after `KEY=` in an override."""
    if isinstance(value, str):
        if _PLAIN.fullmatch(value):
            return value
        quoted = value.replace("\\", "\\\\").replace('"', '\\"')
        return f'"{quoted}"'
    if isinstance(value, list | tuple):
        return f"[{','.join(override_text(v) for v in value)}]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{k}:{override_text(v)}" for k, v in value.items()) + "}"
    return repr(value) if isinstance(value, float) else value_text(value)


def recipe(cell: Cell, family: str) -> str:
    """Recipe of a run: its arm, or the family and what differs beside size, data and seed."""
    if cell.arm is not None:
        return cell.arm
    apart = {
        key: value
        for key, value in cell.axes.items()
        if key not in LENGTH and key.partition(".")[0] not in ("model", "objective")
    }
    apart |= {k: v for k, v in cell.axes.items() if k.startswith("objective.")}
    return ", ".join(
        [family, *(f"{k.rpartition('.')[2]}={value_text(v)}" for k, v in apart.items())]
    )


def _without_excluded(study: Study, cells: list[Cell]) -> list[Cell]:
    left = cells
    for number, rule in enumerate(study.exclude):
        place = f"exclude.{number}"
        known = ["arm", *dict.fromkeys(key for cell in cells for key in cell.axes)]
        for key in rule:
            if key not in known:
                hint = closest(key, known)
                raise ConfigError(
                    f"{place}: {key} is no axis of the study; "
                    + (f"did you mean {hint}?" if hint else f"axes: {', '.join(known)}")
                )
        if not rule or not any(_matches(cell, rule) for cell in cells):
            raise ConfigError(
                f"{place}: no run has {rule}; correct the values, or remove the entry"
            )
        left = [cell for cell in left if not _matches(cell, rule)]
    return left


def _matches(cell: Cell, rule: Mapping[str, Any]) -> bool:
    values = {"arm": cell.arm, **cell.axes}
    for key, wanted in rule.items():
        if key not in values:
            return False
        allowed = wanted if isinstance(wanted, list | tuple) else [wanted]
        if not any(_same(values[key], one) for one in allowed):
            return False
    return True


def _same(one: Any, other: Any) -> bool:
    """True for equal values; 1e18 and its text, which YAML does not take for a number, are."""
    if one == other:
        return True
    try:
        return float(one) == float(other)
    except (TypeError, ValueError):
        return str(one) == str(other)


def _check_reserved(fixed: tuple[str, ...], axes: Mapping[str, Any]) -> None:
    for word in (*fixed, *axes):
        key = word.partition("=")[0]
        if key in RESERVED:
            instead = "stopping:" if key.startswith("train.") else "the name of the study and --dir"
            raise ConfigError(f"{word}: a study sets {key} for each run; use {instead}")


def _describe(cell: Cell) -> str:
    values = {"arm": cell.arm, **cell.axes} if cell.arm is not None else cell.axes
    return ", ".join(f"{key}={value_text(value)}" for key, value in values.items())
