"""Names and shapes of weights as the planner knows them, against those of built models.

By them an optimizer decides what state it keeps of a parameter.
"""

from __future__ import annotations

from math import prod
from typing import Any

import pytest
from small import LENGTH, SPACE

from pretrain.config.run import Config
from pretrain.objectives import build_objective
from pretrain.planning.plan import costs

MODEL = {"num_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "vocab_multiple": 128}
EVERYTHING = {
    "time_conditioning": True,
    "qk_norm": True,
    "short_convolution": 3,
    "tie_embeddings": False,
}


@pytest.mark.parametrize(
    ("objective", "model"),
    [("autoregressive", {}), ("masked", EVERYTHING), ("gaussian", {"activation": "gelu"})],
    ids=str,
)
def test_the_planner_names_every_parameter(topology, objective: str, model: dict[str, Any]) -> None:
    from pretrain.build import build_model

    config = Config.model_validate(
        {
            "data": {"train": "a", "validation": "b", "tokenizer": "c", "seq_length": LENGTH},
            "model": {**MODEL, **model},
            "objective": {"name": objective, "time_window": 2},
        }
    )
    planned = costs(config, SPACE.vocab_size)
    parts = (planned.first, planned.layer, planned.last)
    weights = [weight for part in parts for weight in part.weights]
    assert all(weight.elements == prod(weight.shape) for weight in weights)
    module = build_model(config, topology, build_objective(config.objective, SPACE))
    assert sorted((weight.name, weight.shape) for weight in weights) == sorted(
        (name, tuple(parameter.shape)) for name, parameter in module.named_parameters()
    )
