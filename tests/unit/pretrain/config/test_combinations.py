"""Every layout and every combination of settings that cannot work, refused before anything starts.

Rows go through what `epochal train` does before it launches: compose, then preflight. The data they
name does not exist, so that a legal row is one whose first complaint is about the data.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from cluster import machine
from data_pipeline.errors import DataError
from parallel.errors import LayoutError
from pretrain.config.compose import compose
from pretrain.config.preflight import preflight
from pretrain.errors import ConfigError

DP, TP, PP, CP, SP, ZERO, OFFLOAD = (
    f"parallel.{name}={{}}".format
    for name in (
        "data_parallel_size", "tensor_parallel_size", "pipeline_parallel_size",
        "context_parallel_size", "sequence_parallel", "zero_stage", "offload",
    )
)  # fmt: skip
SHAPE = [
    "model.num_layers=4", "model.hidden_size=256", "model.num_attention_heads=8",
    "model.ffn_hidden_size=512", "data.seq_length=96", "train.global_batch_size=48",
    "data.train=/nowhere/train.json", "data.validation=/nowhere/validation.json",
    "data.tokenizer=/nowhere/tokenizer.model", "tracking.mlflow=false",
]  # fmt: skip
BF16, FLOAT32 = "train.precision=bfloat16", "train.precision=float32"
TAUGHT = ["objective=distillation", "objective.round_sequences=480"]
OVERLAP = "parallel.overlap_comm=true"
COMPILE = "train.compile=true"
KERNEL = "model.short_convolution={}".format
COMPILE_LOSS = "train.compile_loss=true"
FLASH, FLEX = "model.attention=flash", "model.attention=flex"

LAYOUTS_REFUSED = [
    # degrees against the ranks
    ([TP(4)], 6, "does not divide the 6 ranks; start a multiple of 4"),
    ([TP(2), PP(2), CP(1), ZERO(1)], 6, "= 4 does not divide the 6 ranks"),
    ([DP(2)], 4, "= 2 ranks, but there are 4; .*set it to 4"),
    ([TP(0)], None, "tensor_parallel_size"),
    ([ZERO(4)], None, "zero_stage"),
    ([FLOAT32.replace("float32", "float16")], None, "'float32' or 'bfloat16'"),
    # tensor parallelism against the model
    ([TP(16)], None, r"num_attention_heads 8; allowed here: 1, 2, 4, 8"),
    ([TP(4), "model.num_query_groups=2"], None, r"num_query_groups 2; allowed here: 1, 2"),
    ([TP(8), "model.ffn_hidden_size=516"], None, r"ffn_hidden_size 516; allowed here: 1, 2, 3, 4"),
    ([TP(8), "model.vocab_multiple=4"], None, r"vocab_multiple 4; allowed here: 1, 2, 4"),
    # sequence parallelism
    ([SP("true")], None, "tensor_parallel_size is 1; set that to 2 or more"),
    ([TP(2), CP(2), SP("true")], None, "both split the sequence; choose one"),
    ([TP(2), SP("true"), "data.seq_length=97"], None, "seq_length 97 is not divisible by it"),
    # context parallelism
    ([CP(5)], None, "size 1 x parallel.context_parallel_size 5; their product may be 1, 2"),
    ([CP(8), "data.seq_length=100"], None, "allowed here: 1, 2, 4, 5, 10"),
    ([TP(4), CP(4)], None, "their product may be 1, 2, 4, 8"),
    ([CP(4), "model.num_query_groups=2"], None, "their product may be 1, 2"),
    # pipelines
    ([PP(2), CP(2), ZERO(1)], None, "legal at parallel.pipeline_parallel_size 1 only"),
    ([PP(2), ZERO(0)], None, "needs parallel.zero_stage 1, not 0"),
    ([PP(2), ZERO(2)], None, "needs parallel.zero_stage 1, not 2"),
    ([PP(2), ZERO(3)], None, "needs parallel.zero_stage 1, not 3"),
    ([PP(8), ZERO(1)], None, "larger than model.num_layers 4; every stage needs a layer"),
    # two passes through the whole model
    (["objective=gaussian", PP(2), ZERO(1)], None, "pipeline_parallel_size at most 1, not 2; use"),
    (["objective=gaussian", CP(2)], None, "context_parallel_size at most 1, not 2; use data"),
    # a second model
    ([*TAUGHT, PP(2), ZERO(1)], None, "pipeline_parallel_size at most 1, not 2"),
    ([*TAUGHT, CP(2)], None, "context_parallel_size at most 1, not 2"),
    ([*TAUGHT, ZERO(3)], None, "zero_stage at most 2, not 3"),
    # offloading
    ([OVERLAP, ZERO(0)], None, "no effect at zero_stage 0: .*; leave it empty"),
    ([OVERLAP, ZERO(1), BF16], None, "no effect at zero_stage 1 in bfloat16"),
    ([OVERLAP, ZERO(1), PP(2)], None, "no effect in a pipeline"),
    ([OFFLOAD("cpu"), ZERO(0)], None, "offload cpu needs parallel.zero_stage 1 or higher"),
    ([OFFLOAD("nvme"), ZERO(3)], None, "'none' or 'cpu'"),
    # precision and batch
    ([BF16, ZERO(0)], None, "needs parallel.zero_stage 1 or higher"),
    (["train.global_batch_size=9"], 2, "9 is not divisible by the 2 data-parallel ranks"),
    (["train.micro_batch_size=16"], 2, r"does not divide the 24 sequences.*allowed here: 1, 2, 3"),
]  # fmt: skip

KERNELS_REFUSED = [
    ([FLASH, BF16, "run.device=cpu"], "NVIDIA GPU, but run.device is cpu; set .*attention to auto"),
    ([FLEX, "run.device=cpu"], "no backward pass.*run.device is cpu; set .*attention to auto"),
    ([FLASH, FLOAT32], "bfloat16 only.*set train.precision to bfloat16"),
    ([FLASH, BF16, "model.num_attention_heads=64"], "multiple of 8 .*not 4 .*; set .*heads to"),
    ([FLASH, BF16, "model.hidden_size=4096"], "at most 256 .*not 512"),
    ([FLEX, "model.num_attention_heads=32"], "at least 16 wide, not 8.*heads to a smaller"),
    ([FLEX, "model.attention_dropout=0.1"], "cannot drop attention.*is 0.1; set .*_dropout to 0"),
    (["model.dropout=1.0"], "model.dropout: given 1.0, allowed: less than 1"),
    ([KERNEL(1), "objective=masked"], "reads no neighbour; allowed: 0 .none., or 2 and more"),
    ([KERNEL(-1)], "greater than or equal to 0"),
    ([KERNEL(4), "objective=masked"], "4 has no centre.*masked reads both sides.*e.g. 5"),
    ([KERNEL(4), "objective=gaussian"], "no centre"),
    ([KERNEL(5), "objective=block"], "cannot be used with objective block, .*set .* to 0"),
    ([KERNEL(4), "objective=esoteric"], "cannot be used with objective esoteric"),
    ([KERNEL(4), "objective=autoregressive_orders"], "neighbours in the text, which .*orders"),
    ([KERNEL(5), "objective=masked", CP(2)], "needs parallel.context_parallel_size 1, not 2"),
    ([KERNEL(4), "objective=autoregressive", TP(2), SP("true")],
     "needs parallel.sequence_parallel false, not true"),
    (["train.recompute=some"], "'none', 'selective' or 'full'"),
    (["train.recompute_layers=2"], "set that to selective or full"),
    (["train.recompute=full", "train.recompute_layers=5"], "5 is more than model.num_layers 4"),
    ([COMPILE, ZERO(3)], "compile true .*zero_stage is 3, allowed are 0, 1 and 2; change that"),
    ([COMPILE, CP(2)], "compile true .*context_parallel_size is 2, allowed is 1"),
    ([COMPILE, "model.dropout=0.1"], "model.dropout is 0.1, allowed is 0"),
    ([COMPILE, "model.attention_dropout=0.1"], "model.attention_dropout is 0.1, allowed is 0"),
    ([COMPILE, "objective=autoregressive", "data.documents=masked"], "allowed is packed"),
    (["train.compile=some"], "train.compile"),
    (
        [COMPILE_LOSS, TP(2)],
        "compile_loss true .*parallel_size is 2, allowed is 1; change that, or set .*loss to false",
    ),
    ([COMPILE_LOSS, "objective=gaussian"], "compile_loss true .*objective is gaussian, which"),
    (["train.loss_chunk=-1"], "greater than or equal to 0"),
    (["objective=gaussian", "train.loss_chunk=64"], "is null or 0, not 64; lower"),
    (["objective=autoregressive", "objective.orders=2", "data.documents=masked"],
     "set data.documents to packed"),
]  # fmt: skip

LEGAL = [
    ([], 1), ([], 8), ([TP(2), SP("true"), ZERO(0)], 4), ([TP(2), PP(2), ZERO(1), BF16], 8),
    ([PP(4), ZERO(1), "train.micro_batch_size=6"], 4), ([CP(4), ZERO(3), BF16], 8),
    ([CP(2), TP(4), ZERO(2)], 8), ([DP(3), ZERO(3)], 3), ([CP(2), "objective=block"], 2),
    ([CP(2), "objective=esoteric"], 2), ([*TAUGHT, TP(2), ZERO(2)], 4),
    ([CP(2), "objective=autoregressive_orders"], 2),
    ([KERNEL(5), "objective=autoregressive", TP(2), PP(2), ZERO(1)], 4),
    ([KERNEL(5), "objective=duo", ZERO(3)], 2), ([KERNEL(4), "objective=autoregressive"], 1),
    ([KERNEL("null"), "objective=block", CP(2)], 2),
    ([KERNEL(3), "objective=masked", "data.documents=masked", "train.recompute=full"], 1),
    ([COMPILE, TP(2), PP(2), ZERO(1)], 4), ([ZERO(3), "model.dropout=0.1"], 2),
    ([CP(2), "data.documents=masked", "objective=autoregressive", "objective.hide=queries"], 2),
]  # fmt: skip


def refuse(overrides: list[str], world_size: int | None) -> str:
    """Message for the user."""
    with pytest.raises((ConfigError, LayoutError)) as caught:
        preflight(compose([*SHAPE, *overrides]), world_size)
    assert caught.value.exit_code == 2
    return str(caught.value)


@pytest.mark.parametrize(("overrides", "world_size", "words"), LAYOUTS_REFUSED, ids=str)
def test_illegal_layouts(overrides: list[str], world_size: int | None, words: str) -> None:
    message = refuse(overrides, world_size)
    assert re.search(words, message), message


@pytest.mark.parametrize(("overrides", "words"), KERNELS_REFUSED, ids=str)
def test_illegal_combinations(overrides: list[str], words: str) -> None:
    message = refuse(overrides, None)
    assert re.search(words, message), message


@pytest.mark.parametrize(("overrides", "world_size"), LEGAL, ids=str)
def test_legal_layouts_reach_the_data(overrides: list[str], world_size: int) -> None:
    with pytest.raises(DataError, match="/nowhere/"):
        preflight(compose([*SHAPE, *overrides]), world_size)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["run.device=cuda"], "no NVIDIA driver; set run.device to auto or cpu"),
        ([FLEX], "NVIDIA GPU, but this machine has none; set model.attention to auto"),
        ([FLASH, BF16], "NVIDIA GPU, but this machine has none; set model.attention to auto"),
    ],
    ids=str,
)
def test_a_machine_without_a_gpu(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, overrides: list[str], words: str
) -> None:
    monkeypatch.setattr(machine, "has_gpu", lambda: False)
    assert words in refuse(overrides, None)
    # Hosts of a hostfile are other machines; their ranks find out.
    (tmp_path / "hosts").write_text("n1 slots=1\n")
    with pytest.raises(DataError):
        preflight(compose([*SHAPE, *overrides, f"parallel.hostfile={tmp_path}/hosts"]))


def test_a_gpu_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "has_gpu", lambda: True)
    monkeypatch.setattr("pretrain.config.preflight.find_spec", lambda name: None)
    assert "needs the package flash-attn or flash-attn-4" in refuse([FLASH, BF16], None)
    with pytest.raises(DataError):
        preflight(compose([*SHAPE, FLEX]))
