"""Which layouts are legal, as a table, and what the refusals say."""

from __future__ import annotations

import subprocess
import sys

import pytest

from parallel.errors import LayoutError
from parallel.layout.rules import Layout, check_rules, divisors, split_batch
from parallel.layout.topology import check_layout

TP, PP, CP, DP = (
    "tensor_parallel_size",
    "pipeline_parallel_size",
    "context_parallel_size",
    "data_parallel_size",
)

LEGAL = [
    ({"world_size": 1}, (1, 1, 1, 1)),
    ({"world_size": 8}, (1, 1, 1, 8)),
    ({"world_size": 8, TP: 2}, (2, 1, 1, 4)),
    ({"world_size": 8, TP: 2, PP: 2, "zero_stage": 1}, (2, 2, 1, 2)),
    ({"world_size": 4, CP: 2}, (1, 1, 2, 2)),
    ({"world_size": 4, TP: 2, CP: 2, "zero_stage": 3}, (2, 1, 2, 1)),
    ({"world_size": 2, TP: 2, "sequence_parallel": True, "seq_length": 6}, (2, 1, 1, 1)),
    ({"world_size": 2, DP: 2, "zero_stage": 2, "precision": "bfloat16"}, (1, 1, 1, 2)),
    ({"world_size": 2, PP: 2, "zero_stage": 1, "num_layers": 2}, (1, 2, 1, 1)),
    ({"world_size": 4, TP: 4, "sizes": {"num_attention_heads": 12}}, (4, 1, 1, 1)),
]

ILLEGAL = [
    ({"world_size": 0}, "world_size is 0"),
    ({"world_size": 2, TP: 0}, "tensor_parallel_size is 0"),
    ({"world_size": 2, DP: -1}, "data_parallel_size is -1"),
    ({"world_size": 6, TP: 4}, "does not divide the 6 ranks; start a multiple of 4"),
    ({"world_size": 8, TP: 2, DP: 2}, r"= 4 ranks, but there are 8; start 4, set it to 4,"),
    ({"world_size": 1, "zero_stage": 4}, "zero_stage is 4; allowed are 0, 1, 2, 3"),
    ({"world_size": 1, "precision": "float16"}, "allowed are float32, bfloat16"),
    ({"world_size": 1, "precision": "bfloat16"}, "bfloat16 needs parallel.zero_stage 1"),
    ({"world_size": 2, PP: 2, "zero_stage": 0}, "needs parallel.zero_stage 1, not 0"),
    ({"world_size": 2, PP: 2, "zero_stage": 2}, "needs parallel.zero_stage 1, not 2"),
    ({"world_size": 2, PP: 2, "zero_stage": 3}, "needs parallel.zero_stage 1, not 3"),
    (
        {"world_size": 4, PP: 2, CP: 2, "zero_stage": 1},
        "legal at parallel.pipeline_parallel_size 1",
    ),
    ({"world_size": 2, "sequence_parallel": True}, "tensor_parallel_size is 1"),
    ({"world_size": 4, TP: 2, CP: 2, "sequence_parallel": True}, "choose one"),
    ({"world_size": 8, TP: 8, "sizes": {"num_attention_heads": 12}}, "allowed here: 1, 2, 3, 4, 6"),
    ({"world_size": 4, TP: 2, CP: 2, "num_query_groups": 6}, "their product may be 1, 2, 3, 6"),
    ({"world_size": 4, PP: 4, "zero_stage": 1, "num_layers": 3}, "larger than model.num_layers 3"),
    ({"world_size": 2, TP: 2, "sequence_parallel": True, "seq_length": 7}, "split into 2 parts"),
    ({"world_size": 2, CP: 2, "seq_length": 9}, "allowed here: 1, 3, 9"),
]


@pytest.mark.parametrize(("asked", "degrees"), LEGAL)
def test_legal_layouts_multiply_to_the_ranks(asked, degrees) -> None:
    layout = check_layout(**asked)
    assert (
        layout.tensor_parallel_size,
        layout.pipeline_parallel_size,
        layout.context_parallel_size,
        layout.data_parallel_size,
    ) == degrees
    assert layout.world_size == asked["world_size"]


@pytest.mark.parametrize(("asked", "words"), ILLEGAL)
def test_illegal_layouts_are_refused_with_what_is_allowed(asked, words) -> None:
    with pytest.raises(LayoutError, match=words):
        check_layout(**asked)


def test_checking_needs_neither_torch_nor_a_process_group() -> None:
    code = (
        "import sys; from parallel.layout.topology import check_layout\n"
        "check_layout(world_size=4)\n"
        "assert not {'torch', 'deepspeed', 'megatron'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_layout_reads_well() -> None:
    assert str(check_layout(world_size=1)) == "1 rank"
    assert str(check_layout(world_size=4, tensor_parallel_size=2)) == "tp2 x dp2"


def test_offloading_needs_a_sharded_optimizer() -> None:
    check_rules(Layout(), 1, "float32", "cpu")
    with pytest.raises(LayoutError, match=r"offload cpu needs parallel\.zero_stage 1 or higher"):
        check_rules(Layout(), 0, "float32", "cpu")
    with pytest.raises(LayoutError, match="allowed are none, cpu"):
        check_rules(Layout(), 1, "float32", "nvme")


def test_a_batch_is_split_evenly_or_refused_with_what_would_do() -> None:
    assert split_batch(48, None, 4) == (12, 1)
    assert split_batch(48, 3, 4) == (3, 4)
    with pytest.raises(LayoutError, match=r"48 is not divisible by the 5 .* multiple of 5, or a"):
        split_batch(48, None, 5)
    with pytest.raises(LayoutError, match=r"5 does not divide the 12 .* here: 1, 2, 3, 4, 6, 12$"):
        split_batch(48, 5, 4)


def test_divisors() -> None:
    assert divisors(12, 6) == [1, 2, 3, 4, 6]
