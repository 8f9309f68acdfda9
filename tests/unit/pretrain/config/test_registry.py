"""Components by name: what is accepted, what is refused, and what another package can do wrong."""

from __future__ import annotations

from importlib.metadata import EntryPoint
from typing import ClassVar, Literal

import pytest

from pretrain.config import registry as module
from pretrain.config.objectives import objectives
from pretrain.config.registry import Component, Registry
from pretrain.errors import ConfigError


class Base(Component):
    """A kind for these tests."""


def plain(outside: tuple[EntryPoint, ...], monkeypatch: pytest.MonkeyPatch) -> Registry[Base]:
    """A registry with one member and these entry points."""

    class Plain(Base):
        name: Literal["plain"] = "plain"
        implementation: ClassVar[str] = "json:JSONDecoder"
        width: int = 1

    monkeypatch.setattr(module, "_entry_points", lambda group: outside)
    made: Registry[Base] = Registry("thing", Base, "plain")
    made.register(Plain)
    return made


def test_settings_load_what_they_configure(monkeypatch: pytest.MonkeyPatch) -> None:
    import json

    things = plain((), monkeypatch)
    assert things.validate({"width": 2}) == things.make("plain", width=2)
    assert things.make("plain").load() is json.JSONDecoder


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"name": "plane"}, r"unknown thing 'plane'; did you mean plain\? known: plain$"),
        ({"widht": 2}, r"unknown key thing.widht; did you mean thing.width\?"),
        ({"colour": 2}, "unknown key thing.colour; plain has width"),
        (3, "given 3, but it is a section"),
        ({"width": "wide"}, "valid integer"),
    ],
)
def test_other_values_are_refused_with_what_is_allowed(
    value: object, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=message):
        plain((), monkeypatch).validate(value)


def test_a_setting_of_another_family_names_the_family_that_has_it() -> None:
    with pytest.raises(ValueError, match="masked has no setting 'block_size', which is one of bl"):
        objectives.make("masked", block_size=16)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("no_such_module_here:X", "no_such_module_here:X, which cannot be imported"),
        ("json:JSONDecoder", "is no settings class of a"),
        ("pretrain.config.objectives:MaskedConfig", "is no settings class of a"),
    ],
)
def test_a_broken_package_is_named_when_it_is_used_and_not_before(
    target: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    things = plain((EntryPoint("broken", target, "epochal.things"),), monkeypatch)
    assert things.names() == ["broken", "plain"]
    assert things.make("plain").name == "plain"
    with pytest.raises(ConfigError, match=message):
        things.get("broken")


def test_an_entry_point_under_another_name_than_its_settings_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    point = EntryPoint("other", f"{__name__}:Renamed", "epochal.things")
    monkeypatch.setattr(EntryPoint, "load", lambda self: Renamed)
    with pytest.raises(ConfigError, match=r"declared as thing 'other'.* named 'renamed'"):
        plain((point,), monkeypatch).get("other")


class Renamed(Base):
    """Settings whose name is not that of the entry point."""

    name: Literal["renamed"] = "renamed"
