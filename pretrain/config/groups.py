"""Groups of options: the folders of `configs/` here and in other packages, and their files.

Hydra composes them. Names are checked before, because the errors of Hydra suggest no alternative.
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
"""Folder of the packaged groups; installed wheels have it next to this package."""
OPTIONAL_GROUPS = ("runs",)
"""Groups without a default; their options set values of several sections."""
NOT_GROUPS = ("machine", "sampler", "study")
"""Folders of `configs/` that do not belong to a training run."""
COMPONENTS = ("objective", "optimizer", "sampler", "tracker")
"""Kinds of components that other packages may add."""


def groups() -> dict[str, list[str]]:
    """List the groups of a run with their options: packaged ones, and those of other packages."""
    return {name: options for name, options in _options().items() if name not in NOT_GROUPS}


def compose_groups(choices: list[tuple[str, str | None]]) -> DictConfig:
    """Compose these (group, option) over the default ones; raises ConfigError."""
    known = groups()
    for group, name in choices:
        if name is None and group in OPTIONAL_GROUPS:
            continue
        if name not in known[group]:
            raise _unknown(group, str(name), known[group])
    lines = [f"{group}={'null' if name is None else name}" for group, name in choices]
    if roots := _other_packages():
        lines.append(f"hydra.searchpath=[{','.join(f'file://{root}' for root in roots)}]")
    return deepcopy(_composed(tuple(lines)))


@cache
def _composed(lines: tuple[str, ...]) -> DictConfig:
    """Compose these choices by Hydra once, because it takes 0.15 s; the result must not change."""
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
    """Read the option `name` of a group, from the packaged folder or from another package."""
    for root in (CONFIG_ROOT, *_other_packages()):
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
    """List the folders of options, and the names in each."""
    found: dict[str, set[str]] = {}
    for root in (CONFIG_ROOT, *_other_packages()):
        for folder in root.iterdir():
            names = {p.stem for p in folder.glob("*.yaml")} if folder.is_dir() else set()
            if names:
                found.setdefault(folder.name, set()).update(names)
    return {folder: sorted(names) for folder, names in sorted(found.items())}


def _other_packages() -> list[Path]:
    """Find folders of options in other packages."""
    return outside_folders(COMPONENTS)
