"""YAML files of others are refused before a few lines become a billion values."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pretrain.config.compose import load_config
from pretrain.config.prepare_file import read_settings
from pretrain.config.yaml_file import LARGEST_FILE, read_mapping
from pretrain.errors import ConfigError
from pretrain.planning.machines import load_machine

LAUGHS = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 40))
DOUBLED = "a0: x\n" + "".join(f'a{n}: "${{a{n - 1}}}${{a{n - 1}}}"\n' for n in range(1, 40))
WRONG = {
    "billion laughs": (LAUGHS, "more than 100,000 values"),
    "an alias of itself": ("a: &a [*a]\n", "names nothing that is complete"),
    "an unknown alias": ("a: *b\n", "names nothing that is complete"),
    "deep lists": ("a: " + "[" * 100_000, "more than 50 levels"),
    "deep mappings": ("".join(" " * n + f"a{n}:\n" for n in range(400)), "more than 50 levels"),
    "interpolations": (DOUBLED, "more than 16 interpolations"),
    "a Python object": ("a: !!python/object/apply:os.system [touch evil]\n", "cannot read"),
    "no UTF-8": (b"a: \xff\n", "cannot read"),
    "NUL": ("a: \0\n", "cannot read"),
    "a list": ("[1]", "is not a mapping"),
    "large": (" " * LARGEST_FILE + "a: 1\n", "larger than 1,048,576 bytes"),
}
READERS: dict[str, Callable[[Path], Any]] = {
    "--config": load_config,
    "--settings": lambda path: read_settings(path, None, None, []),
    "--machine": lambda path: load_machine(str(path)),
}


@pytest.mark.parametrize("reader", READERS.values(), ids=READERS.keys())
@pytest.mark.parametrize(("text", "reason"), WRONG.values(), ids=WRONG.keys())
def test_every_reader_of_yaml_is_bounded(
    reader: Callable[[Path], Any], text: str | bytes, reason: str, tmp_path: Path
) -> None:
    path = tmp_path / "a.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError, match=reason) as caught:
        reader(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 1000
    assert [p.name for p in tmp_path.iterdir()] == ["a.yaml"]


@pytest.mark.parametrize("reader", READERS.values(), ids=READERS.keys())
def test_pipes_and_devices_are_not_read(reader: Callable[[Path], Any], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(ConfigError, match="not a regular file"):
            reader(path)


def test_anchors_are_still_allowed(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("base: &base {x: 1}\nsources: [*base, *base]\n")
    assert read_mapping(path, "")["sources"] == [{"x": 1}, {"x": 1}]
