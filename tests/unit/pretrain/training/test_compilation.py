"""What `train.compile` comes to, and what is said about it."""

from __future__ import annotations

from pathlib import Path

import pytest

from pretrain.config.compose import compose
from pretrain.config.preflight import preflight
from pretrain.errors import ConfigError
from pretrain.training import compilation

SHAPE = [
    "data.seq_length=96",
    "data.train=/nowhere/train.json",
    "data.validation=/nowhere/validation.json",
    "data.tokenizer=/nowhere/tokenizer.model",
    "train.global_batch_size=48",
]
BF16 = "train.precision=bfloat16"


@pytest.mark.parametrize(
    ("overrides", "device", "kinds", "said"),
    [
        ([BF16], "cuda", ("causal",), "on"),
        ([BF16], "cuda", ("causal", "bidirectional"), "on"),
        ([BF16], "cpu", ("causal",), "off: the kernels for the CPU"),
        ([], "cuda", ("causal",), "off: train.precision is float32"),
        ([BF16], "cuda", ("causal", "columns"), "off: attention rules vary"),
        ([BF16, "parallel.zero_stage=3"], "cuda", ("causal",), "off: parallel.zero_stage is 3"),
        ([BF16, "parallel.tensor_parallel_size=2"], "cuda", ("causal",), "off: tensor parallelism"),
        ([BF16, "model.dropout=0.1"], "cuda", ("causal",), "off: model.dropout is 0.1"),
        (["train.compile=true"], "cpu", ("columns",), "on"),
        ([BF16, "train.compile=false"], "cuda", ("causal",), "off"),
    ],
)
def test_choice(overrides, device, kinds, said, monkeypatch) -> None:
    monkeypatch.setattr(compilation, "missing_compiler", lambda: None)
    config = compose([*SHAPE, "train.compile=auto", *overrides])
    choice = compilation.choose_compilation(config, device, kinds)
    assert choice.description.startswith(said)
    assert choice.on == (said == "on")


def test_without_a_compiler_auto_goes_on_and_true_is_refused(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", str(tmp_path / "g++"))
    choice = compilation.choose_compilation(
        compose([*SHAPE, BF16, "train.compile=auto"]), "cuda", ("causal",)
    )
    assert not choice.on
    assert "no C++ compiler" in choice.description
    with pytest.raises(ConfigError, match=r"no C\+\+ compiler .*install g\+\+.* auto or false"):
        preflight(compose([*SHAPE, "train.compile=true"]))
    with pytest.raises(ConfigError, match=r"compile_loss true: .*install g\+\+.* to false$"):
        preflight(compose([*SHAPE, "train.compile_loss=true"]))
