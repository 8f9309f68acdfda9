"""Registries of components by name: objectives, optimizers, samplers and trackers.

A component is a small settings class without torch (`Component`) that names its implementation. The
registry of its kind maps `name` to the class. Ours register by decorator when `pretrain.config` is
imported. Those of other packages are found through entry points, and imported when a configuration
names them:

    [project.entry-points."epochal.objectives"]
    reversed = "my_package.reversed:ReversedConfig"

A package may have Hydra options in a folder `configs/` next to its `__init__.py`, laid out as that
of this project: `my_package/configs/objective/reversed.yaml` makes `objective=reversed` work.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from pretrain.config.suggest import closest
from pretrain.config.types import Section
from pretrain.errors import ConfigError


class Component(Section):
    """Settings of one member of a kind; a subclass sets `name: Literal["..."] = "..."`."""

    name: str
    implementation: ClassVar[str]
    """Implementation of these settings as `package.module:Class`, imported when it is needed."""

    @classmethod
    def load(cls) -> Any:
        """Import the class of the implementation."""
        module, _, attribute = cls.implementation.partition(":")
        return getattr(import_module(module), attribute)


C = TypeVar("C", bound=Component)
Member = TypeVar("Member", bound=Component)


class Registry(Generic[C]):
    """Settings classes of one kind by name: a discriminated union that other packages extend."""

    def __init__(self, kind: str, base: type[C], default: str | None = None) -> None:
        """Make a registry for the section `kind`; `default` is the name where none is given."""
        self.kind = kind
        self._base = base
        self._default = default
        self._classes: dict[str, type[C]] = {}

    def register(self, cls: type[Member]) -> type[Member]:
        """Register a settings class under its name; a class decorator."""
        assert self._base in cls.__mro__, f"{cls.__name__} is no {self._base.__name__}"
        name = cls.model_fields["name"].default
        assert isinstance(name, str), f'{cls.__name__} lacks `name: Literal["..."] = "..."`'
        known = self._classes.get(name)
        assert known is None or known is cls, f"{self.kind} {name!r} is registered twice"
        self._classes[name] = cls  # type: ignore[assignment]
        return cls

    def names(self) -> list[str]:
        """List all names, sorted; no other package is imported."""
        return sorted({*self._classes, *(point.name for point in _entry_points(self._group))})

    def get(self, name: str) -> type[C]:
        """Find the settings class of a name; raises ConfigError that lists the known names."""
        if name not in self._classes:
            self._import(name)
        return self._classes[name]

    def dotted_keys(self) -> list[str]:
        """List the dotted keys of every member imported so far."""
        fields = {field for cls in self._classes.values() for field in cls.model_fields}
        return [f"{self.kind}.{field}" for field in sorted(fields)]

    def make(self, name: str, **fields: Any) -> C:
        """Make the settings of a member by name; raises ValueError as `validate` does."""
        return self.validate({"name": name, **fields})

    def validate(self, value: Any) -> C:
        """Make settings from plain values, by their `name`; the validator of the section's field.

        Raises ValueError (which pydantic turns into a ValidationError) for unknown names, and for
        keys of another member.
        """
        if isinstance(value, self._base):
            return value
        if not isinstance(value, Mapping):
            raise ValueError(f"given {value!r}, but it is a section; set {self.kind}.KEY=VALUE")
        name = value.get("name", self._default)
        if not isinstance(name, str):
            raise ValueError(f"{self.kind}.name is missing; known: {', '.join(self.names())}")
        try:
            cls = self.get(name)
        except ConfigError as error:
            raise ValueError(str(error)) from None
        foreign = [str(key) for key in value if key not in cls.model_fields]
        if foreign:
            raise ValueError("; ".join(self._refusal(cls, name, key) for key in sorted(foreign)))
        return cls.model_validate(dict(value))

    @property
    def _group(self) -> str:
        return f"epochal.{self.kind}s"

    def _refusal(self, cls: type[C], name: str, key: str) -> str:
        """Message for a key that member `name` does not have."""
        allowed = sorted(cls.model_fields.keys() - {"name"})
        hint = closest(key, allowed)
        holders = [n for n, other in sorted(self._classes.items()) if key in other.model_fields]
        if holders:
            return (
                f"{self.kind} {name} has no setting {key!r}, which is one of {', '.join(holders)}; "
                f"it has {', '.join(allowed)}"
            )
        meant = f"did you mean {self.kind}.{hint}?" if hint else f"{name} has {', '.join(allowed)}"
        return f"unknown key {self.kind}.{key}; {meant}"

    def _import(self, name: str) -> None:
        """Import the member of another package."""
        points = [point for point in _entry_points(self._group) if point.name == name]
        if not points:
            hint = closest(name, self.names())
            raise ConfigError(
                f"unknown {self.kind} {name!r}; "
                + (f"did you mean {hint}? " if hint else "")
                + f"known: {', '.join(self.names())}"
            )
        try:
            found = points[0].load()
        except Exception as error:  # another package's import may raise anything
            raise ConfigError(
                f"{self.kind} {name!r} is declared by {points[0].value}, which cannot be imported: "
                f"{type(error).__name__}: {error}; repair or uninstall that package"
            ) from error
        if not (isinstance(found, type) and issubclass(found, self._base)):
            raise ConfigError(
                f"{points[0].value} is declared as {self.kind} {name!r}, but it is no settings "
                f"class of a {self.kind}; name a subclass of {self._base.__name__}"
            )
        self.register(found)
        if name not in self._classes:
            raise ConfigError(
                f"{points[0].value} is declared as {self.kind} {name!r}, but its settings are "
                f"named {found.model_fields['name'].default!r}; give both the same name"
            )


@cache
def _entry_points(group: str) -> tuple[EntryPoint, ...]:
    """Find the entry points of a group, once in a process."""
    return tuple(entry_points(group=group))


def outside_folders(kinds: tuple[str, ...]) -> list[Path]:
    """Find folders `configs/` of packages that register components; no package is imported."""
    roots = {
        point.module.split(".")[0] for kind in kinds for point in _entry_points(f"epochal.{kind}s")
    }
    folders = []
    for root in sorted(roots):
        spec = find_spec(root)
        for place in (spec.submodule_search_locations or []) if spec else []:
            folder = Path(place) / "configs"
            if folder.is_dir():
                folders.append(folder)
    return folders
