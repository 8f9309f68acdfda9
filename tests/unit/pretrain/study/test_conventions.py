"""Conventions of FLOPs: against torch's counter on real steps, and against the papers' numbers."""

from __future__ import annotations

import json

import pytest
import torch
import typer
from typer.testing import CliRunner

from pretrain.batch import CleanBatch
from pretrain.config.objectives import objectives
from pretrain.config.run import ModelConfig
from pretrain.model.size import CONDITION, FREQUENCIES, LEVEL_FREQUENCIES, matrix_parameters
from pretrain.noise.key import NoiseKey
from pretrain.study.conventions import (
    Training,
    conventions,
    hoffmann,
    layers_and_attention,
    layers_and_head,
    model_size,
)
from pretrain.study.flops import forward_parts, train_flops_per_token
from pretrain.vocabulary import TokenSpace

SPACE = TokenSpace(100, 128, 0, 4, 5, (0, 1, 2, 3, 4))
LENGTH, BATCH = 32, 8
SHAPE = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "ffn_hidden_size": 64}
FAMILIES = {
    "autoregressive": {"name": "autoregressive"},
    "orders": {"name": "autoregressive", "orders": 4},
    "masked": {"name": "masked"},
    "masked, simple": {"name": "masked", "loss": "simple"},
    "uniform": {"name": "uniform"},
    "uniform, simple": {"name": "uniform", "loss": "simple"},
    "duo": {"name": "uniform", "curriculum_sequences": 100},
    "interpolating": {"name": "interpolating"},
    "block": {"name": "block", "block_size": 8},
    "esoteric": {"name": "esoteric", "loss": "simple"},
    "esoteric, hybrid": {"name": "esoteric", "alpha0": 0.5},
    "gaussian": {"name": "gaussian"},
    "distillation": {"name": "distillation", "round_sequences": BATCH},
}
CONDITIONED = ("uniform", "distillation")


def build(topology, objective, **changes):
    """Module, and one of its training batches."""
    from pretrain.model.initialize import initialize
    from pretrain.model.teacher import Teacher
    from pretrain.model.transformer import Transformer
    from pretrain.module import ObjectiveModule
    from pretrain.objectives import build_objective

    conditioned = objective["name"] in CONDITIONED
    config = ModelConfig(**{"time_conditioning": conditioned, **SHAPE, **changes})
    family = build_objective(objectives.make(time_window=BATCH, **objective), SPACE)
    causal = family.config.convolution == "causal"
    model, copy = (Transformer(config, SPACE, topology, causal=causal) for _ in range(2))
    initialize(model, seed=3)
    module = ObjectiveModule(model, family)
    if family.teacher:
        module.teacher = Teacher(copy)
        module.teacher.renew(model)
    g = torch.Generator().manual_seed(1)
    clean = CleanBatch(
        tokens=torch.randint(5, 100, (BATCH, LENGTH), generator=g),
        position=torch.arange(BATCH),
        segment=torch.zeros(BATCH, LENGTH, dtype=torch.int32),
        valid=torch.ones(BATCH, LENGTH, dtype=torch.bool),
        all_valid=True,
    )
    return module, family.corrupt(clean, NoiseKey(0, clean.position))


def measured(module, batch):
    """Operations that torch counts in a forward and a backward pass."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        module(batch).backward()
    return counter.get_total_flops()


def conditioning(config):
    """Operations of noise conditioning for one sequence: a forward pass, and with its backward.

    They do not grow with the length of a sequence; `counted` leaves them out. The sinusoids need
    no gradient.
    """
    c, f, h = CONDITION, FREQUENCIES, config.hidden_size
    later = c * c + c * h * (6 * config.num_layers + 2)
    return 2 * (f * c + later), 2 * (2 * f * c + 3 * later)


def expected(module, batch):
    """Operations of `counted` for this batch: all pairs of attention, and the real rows of the
    head; with the named differences."""
    config, (rows, length) = module.model.config, batch.ids.shape[:2]
    parts = forward_parts(config, 128, length, causal=False).times(rows * length)
    head = parts.head if batch.rows is None else 2 * config.hidden_size * 128 * len(batch.rows)
    forward = parts.layers + parts.attention + head
    once, both = conditioning(config) if config.time_conditioning else (0, 0)
    total = 3 * forward + rows * both
    if module.teacher is not None:
        total += forward + rows * once
    if module.own is not None:
        passes = len(batch.auxiliary["first_pass"])
        total += forward * passes / rows + auxiliary(module, rows * length, rows, passes)
    return total


def auxiliary(module, tokens, rows, passes):
    """Operations of the network of Gaussian diffusion, beside the transformer.

    Products of `enter`, `remember` (whose input has no gradient) and `tell`; products over the
    vocabulary: two forward (logits of the prior, mean), five backward.
    """
    h, d = module.model.config.hidden_size, module.own.size
    linear, vocabulary = 2 * h * d, 2 * 128 * d
    tell = 2 * h * 2 * LEVEL_FREQUENCIES
    train = tokens * ((3 + 2) * linear + (2 + 5) * vocabulary) + rows * 3 * tell
    first = passes * (tokens // rows * (2 * linear + 2 * vocabulary) + tell)
    return train + first


@pytest.mark.parametrize("name", FAMILIES)
def test_a_step_of_every_family_has_the_operations_that_torch_counts(topology, name):
    """Exact, once the differences that `docs/studies.md` names are added."""
    module, batch = build(topology, FAMILIES[name])
    assert measured(module, batch) == expected(module, batch)


def test_no_family_is_left_out():
    assert {family["name"] for family in FAMILIES.values()} == set(objectives.names())


def test_convolutions_are_counted_by_us_alone(topology):
    """They are elementwise products, which torch's counter leaves out."""
    module, batch = build(topology, FAMILIES["masked"], short_convolution=4)
    ours = 6 * 2 * 2 * 4 * 32 * BATCH * LENGTH
    assert expected(module, batch) - measured(module, batch) == ours


SHAPES = [
    {"num_query_groups": 1, "qk_norm": True},
    {"activation": "gelu"},
    {"tie_embeddings": False, "activation": "squared_relu"},
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes_of_layers_are_counted_exactly(topology, shape):
    module, batch = build(topology, FAMILIES["autoregressive"], **shape)
    assert measured(module, batch) == expected(module, batch)


def test_a_causal_kernel_is_credited_with_half_of_the_pairs():
    """`counted` is less than torch's count of a step by the pairs above the diagonal alone."""
    model = ModelConfig(**SHAPE)
    all_pairs = train_flops_per_token(model, 128, LENGTH, causal=False)
    causal = train_flops_per_token(model, 128, LENGTH, causal=True)
    above = LENGTH * (LENGTH - 1) / 2 / LENGTH  # pairs above the diagonal, for each query
    assert all_pairs - causal == 3 * 4 * 2 * 32 * above


def test_the_share_of_scored_rows_is_what_batches_have_on_average(topology):
    """`counted` takes the expected number of rows, torch the real one of a batch."""
    for name in ("masked", "uniform, simple", "block", "esoteric", "esoteric, hybrid"):
        module, _ = build(topology, FAMILIES[name])
        family = module.objective
        rows = 0
        for step in range(60):
            clean = CleanBatch(
                tokens=torch.full((BATCH, LENGTH), 7),
                position=step * BATCH + torch.arange(BATCH),
                segment=torch.zeros(BATCH, LENGTH, dtype=torch.int32),
                valid=torch.ones(BATCH, LENGTH, dtype=torch.bool),
                all_valid=True,
            )
            rows += len(family.corrupt(clean, NoiseKey(0, clean.position)).rows)
        share = rows / (60 * BATCH * LENGTH)
        assert share == pytest.approx(family.head_share, abs=0.02), name


HOFFMANN = [  # layers, width, MLP, heads, key size, printed ratio of appendix F to 6 N D
    (10, 640, 2560, 10, 64, 1.03),
    (20, 1024, 4096, 16, 64, 1.10),
    (24, 1280, 5120, 10, 128, 1.08),
    (26, 1792, 7168, 14, 128, 1.04),
    (28, 2048, 8192, 16, 128, 1.03),
    (40, 3584, 14336, 28, 128, 0.99),
]


@pytest.mark.parametrize(("layers", "width", "mlp", "heads", "key", "ratio"), HOFFMANN)
def test_hoffmanns_printed_ratios(layers, width, mlp, heads, key, ratio):
    """Their formula names look-up and head, their table leaves both out; N has the weights of
    relative positions. With both, the smallest model would have a ratio of 1.58."""
    model = ModelConfig(
        num_layers=layers, hidden_size=width, ffn_hidden_size=mlp, num_attention_heads=heads,
        activation="gelu",
    )  # fmt: skip
    assert model.head_size == key
    vocabulary, length = 32_000, 2048
    n = matrix_parameters(model) + layers * width * width + vocabulary * width
    without = hoffmann(model, vocabulary, length) - 3 * 2 * 2 * vocabulary * width
    assert without / (6 * n) == pytest.approx(ratio, abs=0.0051)


STUDY_2026 = [  # layers, width, GFLOP of a forward pass of 2048 tokens
    (6, 256, 53.0),
    (12, 768, 449.4),
    (18, 1280, 1618.7),
    (28, 2176, 6805.4),
]


@pytest.mark.parametrize(("layers", "width", "giga"), STUDY_2026)
def test_the_2026_studys_operations(layers, width, giga):
    model = ModelConfig(
        num_layers=layers, hidden_size=width, num_attention_heads=width // 64,
        ffn_hidden_size=4 * width, activation="gelu", tie_embeddings=False,
    )  # fmt: skip
    per_token = layers_and_head(model, 32_001)
    assert 2048 * per_token / 3 / 1e9 == pytest.approx(giga, rel=4e-3)
    assert layers_and_attention(model, 2048) == 72 * layers * width**2 + 12 * layers * width * 2048


def test_every_convention_stands_beside_the_count():
    """Model size has both forms; each convention is what its name says."""
    model = ModelConfig(**SHAPE, tie_embeddings=False, time_conditioning=True)
    size = model_size(model, 128)
    assert size.parameters - size.non_embedding_parameters == 2 * 128 * 32
    rows = {row.name: row for row in conventions(model, 128, LENGTH, Training(True, 0.5, 2.0, 1.0))}
    counted = {name: row.flops_per_token for name, row in rows.items()}
    whole = train_flops_per_token(
        model, 128, LENGTH, causal=True, head_share=0.5, positions_per_token=2.0, extra_passes=1.0
    )
    assert counted["counted"] == whole
    assert counted["6nd"] == 6 * size.parameters
    assert counted["6nd_no_embeddings"] == 6 * size.non_embedding_parameters
    head = counted["counted"] - counted["counted_no_head"]
    attention = counted["counted"] - counted["counted_no_attention"]
    assert head == pytest.approx(4 * 2 * 32 * 128 * 0.5)
    assert counted["counted_layers"] == pytest.approx(whole - head - attention)
    assert "half of the pairs" in rows["counted"].counts
    assert all(row.source for row in rows.values())


class TestCommand:
    words = ("model=2m", "objective=masked", "data.seq_length=128", "data.train=a",
             "data.validation=b", "data.tokenizer=nowhere")  # fmt: skip

    @staticmethod
    def run(*words):
        from pretrain.cli.study_flops import flops

        app = typer.Typer()
        app.command()(flops)
        answer = CliRunner().invoke(app, words)
        assert answer.exit_code == 0, answer.output
        return answer.output

    def test_it_prints_all_conventions(self):
        text = self.run(*self.words)
        assert "without embeddings" in text
        assert all(name in text for name in ("counted", "6nd", "hoffmann", "arXiv 2602.15014"))

    def test_json_has_the_same_numbers(self):
        found = json.loads(self.run(*self.words, "--vocab-size", "1000", "--json"))
        assert (found["vocab_size"], found["vocabulary_assumed"]) == (1000, False)
        assert found["padded_vocab_size"] == 1024
        assert found["conventions"][0]["relative"] == 1.0
        assert found["head_share"] == 0.5
