"""Conversion of configurations of earlier versions, so that their runs can be resumed.

Version 0.1.0 kept the settings of all families in one section and wrote all of them into
`config.yaml`. There a setting that the run's family does not use has its default.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_FLAT_OBJECTIVE: dict[str, Any] = {
    "loss": "elbo",
    "schedule": "linear",
    "random_length": 0.0,
    "ar_ratio": 0.0,
    "noise": "balanced",
    "uniform_share": 0.2,
    "block_size": 16,
    "clip": [0.0, 1.0],
    "adapt_clip": False,
    "clip_masks": False,
    "alpha0": 1.0,
    "diffusion_share": 0.5,
    "orders": 1,
    "order_kind": "local",
    "hide": "none",
    "hide_share": 0.25,
    "independent_levels": 0.0,
    "curriculum_sequences": 0,
    "curriculum_temperature": [1e-3, 1e-3],
    "curriculum_top_k": 2,
    "curriculum_interval": [0.05, 0.95],
    "embedding_size": 16,
    "end_points": [-3.0, 6.0],
    "self_conditioning": 0.25,
    "reconstruction_share": 0.125,
    "round_sequences": 0,
    "first_gap": 1 / 512,
    "gap_interval": [0.006, 0.9987],
    "divergence": "reverse",
}
"""Settings of all families in version 0.1.0, with their defaults."""
_REMOVED: dict[str, dict[str, Any]] = {"parallel": {"offload_path": None}}
"""Removed settings, with the value at which they had no effect."""


def without_earlier(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Copy `tree` without the settings of 0.1.0 that had no effect.

    A setting that had an effect stays, and is refused where this version does not know it.
    """
    from pretrain.config.objectives import objectives

    result = dict(tree)
    objective = tree.get("objective")
    if isinstance(objective, Mapping) and objective.get("name") in objectives.names():
        fields = objectives.get(objective["name"]).model_fields
        result["objective"] = {
            key: value
            for key, value in objective.items()
            if key in fields or key not in _FLAT_OBJECTIVE or value != _FLAT_OBJECTIVE[key]
        }
    for section, removed in _REMOVED.items():
        values = tree.get(section)
        if isinstance(values, Mapping):
            result[section] = {
                key: value
                for key, value in values.items()
                if key not in removed or value != removed[key]
            }
    return result
