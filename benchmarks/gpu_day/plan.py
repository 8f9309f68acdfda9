"""Rows of a benchmark on a GPU as data: a YAML file in order of value, or a grid of settings."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

PLANS = Path(__file__).parent / "plans"


@dataclass(frozen=True)
class Row:
    """The setting of one measurement."""

    model: str
    """Option of configs/model."""
    objective: str
    """Option of configs/objective."""
    micro_batch: int
    """Sequences of a forward pass."""
    recompute: str = "none"
    compile: bool = False
    """Layers compiled by torch."""
    compile_loss: bool = False
    accumulate: int = 1
    """Forward passes of an optimizer step."""
    profile: bool = False
    """Kernels and host waits listed, by further steps after those that are timed."""

    @property
    def label(self) -> str:
        """The setting in words."""
        compiled = [n for n, on in (("layers", self.compile), ("loss", self.compile_loss)) if on]
        return (
            f"{self.model} {self.objective}, {self.accumulate} x {self.micro_batch} sequences, "
            f"recompute {self.recompute}, compiled {' and '.join(compiled) or 'nothing'}"
        )

    @property
    def family(self) -> tuple[Any, ...]:
        """The setting without the sizes of the batch: rows that differ in these alone share it."""
        return (self.model, self.objective, self.recompute, self.compile, self.compile_loss)

    def as_dict(self) -> dict[str, Any]:
        """The setting as the results name it."""
        return asdict(self)


@dataclass(frozen=True)
class Plan:
    """Rows, and what they have in common."""

    rows: list[Row]
    length: int = 2048
    """Tokens of a sequence."""
    vocabulary: int = 32768
    steps: int = 8
    """Optimizer steps that are timed for each row."""


def read_plan(name: str) -> Plan:
    """The plan of a file, or of a name in `plans/`; raises ValueError where it is malformed."""
    path = Path(name) if name.endswith(".yaml") else PLANS / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in PLANS.glob("*.yaml")))
        raise ValueError(f"there is no plan {name}; given may be a YAML file or one of: {known}")
    values = yaml.safe_load(path.read_text())
    try:
        return Plan(**{**values, "rows": [Row(**row) for row in values["rows"]]})
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a plan: {error}") from None


def grid(
    models: Iterable[str],
    objectives: Iterable[str],
    recompute: Iterable[str],
    compiled: Iterable[bool],
    compiled_loss: Iterable[bool],
    micro_batches: Iterable[int],
    accumulate: int = 1,
) -> list[Row]:
    """Every combination, model by model, with ascending micro-batches; all profiled."""
    combinations = itertools.product(
        models, objectives, recompute, compiled, compiled_loss, sorted(micro_batches)
    )
    return [
        Row(model, objective, size, kept, layers, loss, accumulate, profile=True)
        for model, objective, kept, layers, loss, size in combinations
    ]
