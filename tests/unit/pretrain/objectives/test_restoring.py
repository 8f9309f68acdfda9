"""A stopped run draws on as one without a break: objectives keep nothing beside `state`."""

import json
from pathlib import Path

import pytest
import torch
import toy_language as toy
import yaml

import pretrain
from pretrain.config.objectives import objectives
from pretrain.noise.key import NoiseKey
from pretrain.objectives import build_objective

SOON = {"duo": {"curriculum_sequences": 21}, "distillation": {"round_sequences": 16}}
"""What lets a curriculum end, and rounds begin, within the 48 sequences of these tests."""


def packaged():
    """Every one of `configs/objective`."""
    folder = Path(pretrain.__file__).parents[1] / "configs" / "objective"
    for path in sorted(folder.glob("*.yaml")):
        fields = yaml.safe_load(path.read_text())
        fields = fields.get("objective", fields) | {"time_window": 16} | SOON.get(path.stem, {})
        yield pytest.param(objectives.make(**fields), id=path.stem)


def same(a, b):
    """Whether two fields of a batch are equal to the last bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if hasattr(a, "columns"):
        return a.kind == b.kind and same(a.columns, b.columns)
    return a == b


def weights_alone(batch):
    """The bound of each row if every cross-entropy were 1."""
    out = torch.zeros(len(batch.ids), dtype=torch.float64)
    return out.index_add_(0, batch.sequence, batch.weight.double())


@pytest.mark.parametrize("config", packaged())
def test_a_restored_objective_draws_what_one_without_a_break_draws(config):
    """Steps of 8 sequences; after the third a new process takes over with the saved state alone:
    positions decide everything else, and torch's own generator nothing."""
    tokens = torch.randint(0, toy.V, (512, 12), generator=torch.Generator().manual_seed(0))

    def step(family, number):
        clean = toy.clean_batch(tokens[8 * number :][:8], range(8 * number, 8 * number + 8))
        key = NoiseKey(3, clean.position)
        return {
            "renewed": family.teacher and family.begins_round(8 * number),
            **vars(family.corrupt(clean, key)),
            **{f"bound {k}": v for k, v in vars(family.bound_batch(clean, key)).items()},
        }

    whole, made = build_objective(config, toy.SPACE), []
    for number in range(6):
        if number == 3:
            if whole.adapts:
                clean = toy.clean_batch(tokens, range(512))
                whole.adapt(whole.measure(clean, NoiseKey(1, clean.position), weights_alone))
                assert whole.interval != config.clip
            state = json.loads(json.dumps(whole.state))
        made.append(step(whole, number))
    torch.manual_seed(99)
    after = build_objective(config, toy.SPACE)
    after.restore(state)
    for number in range(3, 6):
        for field, value in step(after, number).items():
            assert same(value, made[number][field]), (number, field)
    assert any(not same(made[3][field], made[4][field]) for field in ("ids", "own"))
