"""Groups of options: the folders of `configs/`, ours and those of other packages, and their files.

Hydra composes them. Names are checked before, because its own errors name no alternative.
"""

from __future__ import annotations

from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrain.config.registry import outside_folders
from pretrain.config.suggest import closest
from pretrain.config.yaml_file import read_mapping
from pretrain.errors import ConfigError

if TYPE_CHECKING:
    from omegaconf import DictConfig

CONFIG_ROOT = Path(__file__).resolve().parents[2] / "configs"
"""The packaged groups; installed wheels carry them beside this package."""
OPTIONAL_GROUPS = ("study", "runs")
"""Groups that need not be chosen; their options set values of several sections."""
NOT_GROUPS = ("machine", "sampler")
"""Folders of `configs/` that say nothing about a training run."""
COMPONENTS = ("objective", "optimizer", "sampler", "tracker")
"""Kinds that other packages may add to."""


def groups() -> dict[str, list[str]]:
    """The groups of a run and their options: ours, and those of packages with components."""
    return {name: options for name, options in _options().items() if name not in NOT_GROUPS}


def compose_groups(choices: list[tuple[str, str | None]]) -> DictConfig:
    """The tree of these (group, option) over the default ones; raises ConfigError."""
    known = groups()
    for group, name in choices:
        if name is None and group in OPTIONAL_GROUPS:
            continue
        if name not in known[group]:
            raise _unknown(group, str(name), known[group])
    lines = [f"{group}={'null' if name is None else name}" for group, name in choices]
    if roots := _outside_roots():
        lines.append(f"hydra.searchpath=[{','.join(f'file://{root}' for root in roots)}]")
    return deepcopy(_composed(tuple(lines)))


@cache
def _composed(lines: tuple[str, ...]) -> DictConfig:
    """What Hydra makes of these choices: not to be changed, kept because it takes 0.15 s."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    try:
        with initialize_config_dir(str(CONFIG_ROOT), version_base="1.3"):
            return hydra_compose("config", list(lines))
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(f"cannot compose {' '.join(lines)}: {error}") from None


def option(kind: str, name: str) -> dict[str, Any]:
    """Values of the option `name` of a group, from our folder or another package's."""
    for root in (CONFIG_ROOT, *_outside_roots()):
        if (file := root / kind / f"{name}.yaml").is_file():
            return read_mapping(file, f"configs/{kind} of the package has examples")
    raise _unknown(kind, name, _options()[kind])


def _unknown(group: str, name: str, known: list[str]) -> ConfigError:
    hint = closest(name, known)
    return ConfigError(
        f"unknown {group} {name!r}; "
        + (f"did you mean {hint}? " if hint else "")
        + f"known: {', '.join(known)}"
    )


def _options() -> dict[str, list[str]]:
    """Every folder of options, and the names in it."""
    found: dict[str, set[str]] = {}
    for root in (CONFIG_ROOT, *_outside_roots()):
        for folder in root.iterdir():
            names = {p.stem for p in folder.glob("*.yaml")} if folder.is_dir() else set()
            if names:
                found.setdefault(folder.name, set()).update(names)
    return {folder: sorted(names) for folder, names in sorted(found.items())}


def _outside_roots() -> list[Path]:
    """Folders of options in other packages."""
    return outside_folders(COMPONENTS)
