"""Sweeps without a file: `epochal train --multirun` by the syntax of Hydra's sweeps.

`objective=autoregressive,masked`, `choice(1,2)`, `range(1,4)` and, for groups, `glob(1*)`. The
sweep becomes a study whose base are the other overrides.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrain.config.compose import quote_calls
from pretrain.config.groups import groups
from pretrain.config.run import RunConfig
from pretrain.errors import ConfigError
from pretrain.study.runner.settings import Study, make_study

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override

DEFAULT_NAME = "multirun"


def multirun_study(overrides: list[str]) -> tuple[Study, Path]:
    """Study of a sweep, and its folder: `run.root`/`run.name`, by default `runs/multirun`.

    Raises ConfigError where nothing is swept.
    """
    grid: dict[str, list[Any]] = {}
    base: list[str] = []
    place = {"run.root": str(RunConfig().root), "run.name": DEFAULT_NAME}
    for text in overrides:
        override = _parse(text)
        if override is None or not override.is_sweep_override():
            key, _, value = text.partition("=")
            if key in place:
                place[key] = str(value if override is None else override.value())
            else:
                base.append(text)
        elif override.key_or_group in grid:
            raise ConfigError(f"{text}: {override.key_or_group} is swept twice; name it once")
        else:
            grid[override.key_or_group] = _values(override, text)
    if not grid:
        raise ConfigError(
            "--multirun needs a key with several values, e.g. objective=autoregressive,masked or "
            "optimizer.lr=1e-3,3e-3"
        )
    values = {"name": place["run.name"], "base": base, "grid": grid, "learning_rate": "not stated"}
    return make_study(values, "--multirun"), Path(place["run.root"]) / place["run.name"]


def _parse(text: str) -> Override | None:
    """Parsed override, None where only `compose` can say what is wrong with it."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parser = OverridesParser.create()
    for form in (text, quote_calls(text)):  # the second: data.order=window(8)
        try:
            return parser.parse_override(form)
        except HydraException:
            continue
    return None


def _values(override: Override, text: str) -> list[Any]:
    """Values of a sweep as plain Python; raises ConfigError for what is no list of values."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import Glob

    key, swept = override.key_or_group, override._value
    if isinstance(swept, Glob):
        if key not in groups():
            raise ConfigError(f"{text}: glob() fits options of a group; {key} is none")
        found: list[Any] = swept.filter(groups()[key])
        if not found:
            raise ConfigError(f"{text}: fits none of {', '.join(groups()[key])}")
        return found
    if not override.is_discrete_sweep():
        raise ConfigError(
            f"{text}: an interval has no list of values; write them, e.g. {key}=1e-3,3e-3"
        )
    parser = OverridesParser.create()
    each = [f"{key}={value}" for value in override.sweep_string_iterator()]
    return [parser.parse_override(one).value() for one in each]
