"""Configurations that version 0.1.0 saved: all of them load, and mean what they meant."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from pretrain.config.compose import compose, flatten, load_config
from pretrain.errors import ConfigError

SAVED = Path(__file__).resolve().parents[3] / "fixtures" / "run_0_1_0" / "configs"


@pytest.mark.parametrize("path", sorted(SAVED.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_packaged_objective_of_the_earlier_version_goes_on(path: Path) -> None:
    """What the file says of its family is what this version composes for the same option."""
    old = yaml.safe_load(path.read_text())
    config = load_config(path)
    data = [f"data.{key}=/moved/{key}" for key in ("train", "validation", "tokenizer")]
    more = ["objective.round_sequences=512"] if path.stem == "distillation" else []
    new = compose([f"objective={path.stem}", "model=tiny", "data=pool", *data, *more])
    assert config.objective == new.objective
    assert config.optimizer == new.optimizer
    for key, value in flatten(config).items():
        section, _, leaf = key.partition(".")
        if leaf in old[section]:
            assert value == old[section][leaf], key


def test_a_setting_that_had_an_effect_is_not_dropped_in_silence(tmp_path: Path) -> None:
    """The earlier version refused it too, when it built the objective."""
    values = yaml.safe_load((SAVED / "masked.yaml").read_text())
    values["objective"]["block_size"] = 8
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(ConfigError, match="objective masked has no setting 'block_size'"):
        load_config(path)
