"""A key that stands twice in a YAML file is refused with both lines."""

from __future__ import annotations

from pathlib import Path

import pytest

from pretrain.config.compose import load_config
from pretrain.config.prepare_file import read_settings
from pretrain.config.yaml_keys import refuse_repeated_keys
from pretrain.errors import ConfigError


def test_settings_and_configurations_with_a_key_twice_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("sources: [x.jsonl]\nvalidation_fraction: 0.2\n\nvalidation_fraction: 0.3\n")
    twice = "the key 'validation_fraction' stands twice, in lines 2 and 4"
    with pytest.raises(ConfigError, match=twice):
        read_settings(path, None, None, [])
    path.write_text("run:\n  name: a\ndata:\n  epochs: 1\n  seq_length: 9\n  epochs: 2\n")
    with pytest.raises(ConfigError, match="the key 'epochs' stands twice, in lines 4 and 6"):
        load_config(path)


def test_equal_keys_of_different_mappings_are_none_twice() -> None:
    text = "a: {b: 1, c: [b, b, {b: 2}]}\nb: &x {a: 1}\nc:\n- a: 1\n- a: *x\n? [b, b]\n: b\n"
    refuse_repeated_keys(text, Path("a.yaml"))
    with pytest.raises(ConfigError, match="'b' stands twice, in lines 1 and 2"):
        refuse_repeated_keys("a: {b: [c],\n  b: 1}\n", Path("a.yaml"))
