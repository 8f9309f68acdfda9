"""Descriptions of machines: defaults and mistakes."""

from __future__ import annotations

import pytest
from planner_cases import MACHINE

from parallel.errors import LayoutError
from parallel.planner.machine import Machine

GOOD = {k: v for k, v in MACHINE.__dict__.items() if not k.endswith(("efficiency", "_us"))}


def test_defaults_are_filled_in() -> None:
    assert Machine.from_mapping(GOOD, "m.yaml") == MACHINE


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"memory_gb": 80}, "m.yaml: unknown key 'memory_gb'; known: .*memory_gib"),
        ({"memory_gib": None}, "memory_gib is None; it must be a number"),
        ({"num_nodes": 0}, "num_nodes is 0; it must be a whole number from 1"),
        ({"num_nodes": 1.5}, "num_nodes is 1.5; it must be a whole number"),
        ({"bfloat16_tflops": "fast"}, "bfloat16_tflops is 'fast'; it must be a number"),
        ({"bfloat16_tflops": 0}, "bfloat16_tflops is 0; it must be larger"),
        ({"matrix_efficiency": 1.2}, r"matrix_efficiency is 1.2; it must lie in \(0, 1\]"),
        ({"reserved_gib": 80}, "reserved_gib 80 leaves nothing of memory_gib 80"),
        ({"host_memory_gib": 100}, "host_reserved_gib 128.0 leaves nothing of host_memory_gib"),
    ],
)
def test_mistakes(change: dict[str, object], message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        Machine.from_mapping({**GOOD, **change}, "m.yaml")


def test_a_missing_key() -> None:
    rest = {k: v for k, v in GOOD.items() if k != "nvlink_gbs"}
    with pytest.raises(LayoutError, match=r"m\.yaml: no value for nvlink_gbs"):
        Machine.from_mapping(rest, "m.yaml")
