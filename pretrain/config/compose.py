"""Composition of one validated `Config` from command-line overrides or a saved file.

Hydra composes the groups (`model=tiny`, `runs=demo`). Single values (`optimizer.lr=1e-3`) are
checked against the pydantic tree before they are applied, so that the error for a misspelt key can
suggest the right one; Hydra's error suggests none. The price is a second walk over the tree (a
millisecond). Paths become absolute, so that a saved configuration means the same from any folder.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import cache
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ValidationError

from pretrain.config.earlier import without_earlier
from pretrain.config.groups import compose_groups, groups, option
from pretrain.config.messages import describe_all, unknown_key
from pretrain.config.registry import C, Registry
from pretrain.config.run import REGISTRIES, Config
from pretrain.config.secrets import REMEDY, keys_with_secrets, take_out
from pretrain.config.yaml_file import read_yaml
from pretrain.errors import ConfigError

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override
    from omegaconf import DictConfig

_REFERENCE = "docs/configuration.md and pretrain/config/, which list all keys"
_CALL = re.compile(r"([\w.]+)=(\w+\([^()'\"]*\))")
"""KEY=NAME(ARGUMENTS): Hydra would call a function, ours are words such as `window(8)`."""


def compose(overrides: list[str], config_file: Path | None = None) -> Config:
    """Compose and validate a configuration: `overrides` of the packaged groups or of `config_file`.

    Raises only `ConfigError`: for unknown groups, options, keys and values.
    """
    parsed = _parse(overrides)
    known = groups()
    choices = [o for o in parsed if _chooses_group(o, known)]
    values = [o for o in parsed if o not in choices]
    if config_file is None:
        tree = compose_groups([(c.key_or_group, _named(c)) for c in choices])
    else:
        if choices:
            raise ConfigError(
                f"{choices[0].input_line}: a group cannot be chosen in addition to "
                f"{config_file}, which is complete; set single values instead, e.g. "
                "model.num_layers=4"
            )
        tree = _read(config_file)
    plain = _apply(tree, values)
    return validate(plain if config_file is None else without_earlier(plain))


def validate(values: Mapping[str, Any]) -> Config:
    """Make a `Config` of plain nested values; a `ConfigError` has one line for each problem."""
    if secret := keys_with_secrets(values):
        raise ConfigError(
            f"{', '.join(secret)}: the address carries a password or key, but {REMEDY}"
        )
    try:
        config = Config.model_validate(dict(values))
    except ValidationError as error:
        raise ConfigError("\n".join(describe_all(error, known_keys(), _REFERENCE))) from None
    return _absolute(config)


def replace_values(config: Config, values: Mapping[str, Any]) -> Config:
    """Copy the configuration with some dotted keys set, and validate it again."""
    tree = config.model_dump(mode="json")
    for dotted, value in values.items():
        *sections, leaf = dotted.split(".")
        node = tree
        for section in sections:
            node = node[section]
        node[leaf] = value
    return validate(tree)


def compose_component(registry: Registry[C], overrides: list[str], values: dict[str, Any]) -> C:
    """Compose the settings of one component that is not part of a run, e.g. a sampler.

    `overrides` are `KIND=OPTION` (a file of `configs/KIND/`) and `KIND.KEY=VALUE`; `values` are
    single keys that replace both. Raises ConfigError.
    """
    kind = registry.kind
    named: dict[str, Any] = {}
    single: dict[str, Any] = {}
    for override in _parse(overrides):
        section, _, key = override.key_or_group.partition(".")
        if section != kind or override.is_delete():
            raise ConfigError(
                f"{override.input_line}: this command takes {kind}=NAME and {kind}.KEY=VALUE only"
            )
        if key:
            single[key] = override.value()
        else:
            named = option(kind, str(override.value()))
    try:
        return registry.validate({**named, **single, **values})
    except ValidationError as error:
        raise ConfigError("\n".join(describe_all(error, registry.dotted_keys()))) from None
    except ValueError as error:
        raise ConfigError(str(error)) from None


def load_config(path: Path) -> Config:
    """Load the configuration saved at `path` (`config.yaml` of a run folder)."""
    return compose([], path)


def save_config(config: Config, path: Path) -> None:
    """Write the resolved configuration atomically; `load_config` reads it."""
    import yaml

    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, width=100)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(f"# Repeat with: epochal train --config {path}\n{text}")
        os.replace(partial, path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink()
        raise ConfigError(f"cannot write {path}: {error.strerror}") from None


def known_keys() -> list[str]:
    """List every dotted key that takes a value, also those of every member of a union."""
    members = [key for registry in REGISTRIES.values() for key in registry.dotted_keys()]
    return sorted({*_leaves(Config), *members})


def flatten(config: Config) -> dict[str, Any]:
    """Map dotted keys to plain values, for comparison and for tracking."""

    def walk(prefix: str, node: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
        for key, value in node.items():
            if isinstance(value, Mapping):
                yield from walk(f"{prefix}{key}.", value)
            else:
                yield prefix + key, value

    return dict(walk("", config.model_dump(mode="json")))


def _parse(overrides: list[str]) -> list[Override]:
    if not overrides:  # ranks read a saved file: Hydra's import is a quarter of a second
        return []
    from hydra.errors import HydraException

    parsed = []
    for text in overrides:
        try:
            override = _parsed(quote_calls(text))
        except HydraException:
            raise ConfigError(
                f"cannot read the override {text!r}; write KEY=VALUE (optimizer.lr=1e-3) or "
                f"GROUP=OPTION (model=tiny), and quote spaces and brackets from the shell"
            ) from None
        if override.is_sweep_override():
            raise ConfigError(
                f"{text}: a run takes one value for each key; `epochal train --multirun` trains "
                "one run for each value"
            )
        parsed.append(override)
    return parsed


@cache
def _parsed(text: str) -> Override:
    """Parse an override once: the runs of a study share most of theirs. It must not change."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    return OverridesParser.create().parse_override(text)


def quote_calls(text: str) -> str:
    """Override with words such as `window(8)` quoted, which Hydra would call."""
    return _CALL.sub(r'\1="\2"', text)


def _named(override: Override) -> str | None:
    """Name of the option that a choice of a group has."""
    value = override.value()
    return None if value is None else str(value)


def _chooses_group(override: Override, known: Mapping[str, Any]) -> bool:
    """True where the override names an option of a group; `model={num_layers: 4}` sets values."""
    named = isinstance(override.value(), str) or override.value() is None
    return named and not override.is_delete() and override.key_or_group in known


def _read(path: Path) -> DictConfig:
    import yaml
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        tree = OmegaConf.load(StringIO(take_out(read_yaml(path), path)))
    except IsADirectoryError:
        raise ConfigError(
            f"{path} is a folder; give its configuration, {path}/config.yaml"
        ) from None
    except FileNotFoundError:
        raise ConfigError(
            f"no configuration at {path}; give the config.yaml of a run folder, or name groups "
            f"instead (epochal train --help)"
        ) from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"cannot read {path}: {' '.join(str(error).split())}") from None
    if not isinstance(tree, DictConfig):
        raise ConfigError(f"{path} is not a mapping of sections (run, data, model, ...)")
    return tree


def _apply(tree: DictConfig, values: list[Override]) -> dict[str, Any]:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    OmegaConf.set_struct(tree, False)
    for override in values:
        key = override.key_or_group
        if override.is_delete():
            raise ConfigError(f"{override.input_line}: keys are not removed; set {key}=null")
        _check_key(key)
        try:
            OmegaConf.update(tree, key, override.value(), merge=True)
        except OmegaConfBaseException as error:
            raise ConfigError(f"{override.input_line}: {_first_line(error)}") from None
    try:
        plain = OmegaConf.to_container(tree, resolve=True, throw_on_missing=False)
    except OmegaConfBaseException as error:
        raise ConfigError(f"cannot resolve the configuration: {_first_line(error)}") from None
    assert isinstance(plain, dict)
    return {str(k): v for k, v in plain.items()}


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]


def _leaves(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from _leaves(kind, f"{prefix}{name}.")
        else:
            yield prefix + name


def _check_key(key: str) -> None:
    if key.partition(".")[0] in REGISTRIES:
        return  # keys depend on the member; `Registry.validate` checks them
    leaves = known_keys()
    if key in leaves or any(leaf.startswith(f"{key}.") for leaf in leaves):
        return
    raise ConfigError(unknown_key(key, [*leaves, *groups()], _REFERENCE))


def _absolute(config: Config) -> Config:
    """Copy the configuration with absolute paths."""

    def absolute(section: BaseModel) -> dict[str, Any]:
        paths = {k: v for k, v in section.__dict__.items() if isinstance(v, Path)}
        return {k: Path(os.path.abspath(v.expanduser())) for k, v in paths.items()}

    sections = {
        name: section.model_copy(update=absolute(section))
        for name, section in config.__dict__.items()
    }
    return config.model_copy(update=sections)
