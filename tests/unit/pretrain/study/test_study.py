"""Counts against what is built and run; claims against the errors of what they compare."""

from __future__ import annotations

import json
import math

import pytest
import torch

from pretrain.batch import AttentionRule
from pretrain.cli.demo import verdict
from pretrain.config.run import ModelConfig
from pretrain.model.size import parameter_count
from pretrain.study.curves import Curve, Point, crossing, overtaking, read_curve
from pretrain.study.flops import forward_parts, train_flops_per_token
from pretrain.vocabulary import TokenSpace

SPACE = TokenSpace(300, 384, 0, 4, 5, (0, 1, 2, 3, 4))
SHAPES = [
    {},
    {"tie_embeddings": False, "qk_norm": True, "num_query_groups": 2},
    {"time_conditioning": True, "activation": "gelu"},
    {"activation": "squared_relu", "ffn_hidden_size": 192},
    {"short_convolution": 4},
]


def build(topology, shape):
    from pretrain.model.initialize import initialize
    from pretrain.model.transformer import Transformer

    config = ModelConfig(**{"num_layers": 3, "hidden_size": 64, "num_attention_heads": 4, **shape})
    model = Transformer(config, SPACE, topology)
    initialize(model, seed=0)
    return config, model


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_parameter_count_is_that_of_the_built_model(topology, shape):
    config, model = build(topology, shape)
    assert parameter_count(config, 384) == sum(p.numel() for p in model.parameters())


def test_forward_flops_are_those_that_torch_counts(topology):
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    config, model = build(topology, {})
    ids = torch.randint(5, 300, (2, 32))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        hidden = model(ids, torch.arange(32)[None], AttentionRule("bidirectional"))
        model.vocabulary(hidden.transpose(0, 1).flatten(0, 1))
    ours = forward_parts(config, 384, 32, causal=False).total * 64
    assert ours == pytest.approx(counter.get_total_flops(), rel=1e-9)


def test_a_convolution_multiplies_and_adds_once_for_each_weight():
    plain, convolved = (
        forward_parts(
            ModelConfig(num_layers=3, hidden_size=64, num_attention_heads=4, short_convolution=k),
            384,
            128,
            causal=True,
            positions_per_token=2.0,
        ).total
        for k in (0, 4)
    )
    assert convolved - plain == 2 * 2 * (3 * 2 * 4 * 64)


def test_cheaper_heads_and_causal_attention_are_credited():
    config = ModelConfig(num_layers=1, hidden_size=64, num_attention_heads=4)
    full = train_flops_per_token(config, 384, 128, causal=False)
    half = train_flops_per_token(config, 384, 128, causal=False, head_share=0.5)
    assert full - half == 3 * 64 * 384
    causal = train_flops_per_token(config, 384, 128, causal=True)
    assert full - causal == 3 * 4 * 64 * (128 - 129 / 2)


PUBLISHED = [  # layers, width, parameters in millions, GFLOP of a forward pass of 2048 tokens
    (6, 256, 22.45, 53.0),
    (12, 768, 141.566, 449.41),
    (24, 1792, 1073.7, 4025.6),
    (28, 2176, 1778.5, 6805.4),
]


def diffusion_transformer(layers, width):
    """The network of the scaling study (arXiv 2602.15014), in our terms."""
    return ModelConfig(
        num_layers=layers, hidden_size=width, num_attention_heads=width // 64, activation="gelu",
        ffn_hidden_size=4 * width, tie_embeddings=False, time_conditioning=True,
    )  # fmt: skip


@pytest.mark.parametrize(("layers", "width", "millions", "giga"), PUBLISHED)
def test_published_diffusion_transformers_have_their_parameters_and_operations(
    layers, width, millions, giga
):
    """T22 to T24. Theirs has biases in MLP and head, which ours lacks, and counts no attention."""
    vocabulary, length = 32_001, 2048
    config = diffusion_transformer(layers, width)
    count = parameter_count(config, vocabulary) + 5 * width * layers + vocabulary
    assert count / 1e6 == pytest.approx(millions, abs=0.06)
    attention = 4 * layers * width * length
    each = forward_parts(config, vocabulary, length, causal=False).total - attention
    assert length * each / 1e9 == pytest.approx(giga, rel=4e-3)
    if layers == 12:
        train = train_flops_per_token(config, vocabulary, length, causal=False) - 3 * attention
        steps = 6e18 / (256 * length * train)
        assert steps == pytest.approx(17_383, rel=4e-3)
        assert 3 * attention / train == pytest.approx(0.34, abs=0.01)  # what they leave out


def test_operations_of_published_runs_are_theirs():
    """I35, I36 (arXiv 2512.10858): 72 L d^2 + 12 L d S for each token, and what two runs cost."""

    def flops(layers, width):
        config = ModelConfig(
            num_layers=layers, hidden_size=width, num_attention_heads=width // 128,
            activation="squared_relu", ffn_hidden_size=4 * width,
        )  # fmt: skip
        return train_flops_per_token(config, 1, 2048, causal=False, head_share=0.0)

    assert flops(24, 2048) == 8_455_716_864
    assert flops(18, 3072) * 1536 * 2048 * 23_500 == pytest.approx(1e21, rel=0.01)
    assert flops(34, 4608) * 3072 * 2048 * 29_000 == pytest.approx(1e22, rel=0.02)


def curve(label, losses, error=0.01):
    return Curve(
        label,
        tuple(Point(float(e), e * 1e9, nats, error, nats / 2) for e, nats in enumerate(losses, 1)),
    )


AR = curve("autoregressive", [5.0, 4.5, 4.8, 5.2], error=0.0)


def test_crossing_needs_twice_the_error_and_is_never_claimed_without():
    near = curve("masked diffusion", [6.0, 5.0, 4.49, 4.48])
    assert crossing(near, AR) is None
    below = curve("masked diffusion", [6.0, 5.0, 4.49, 4.47])
    point = crossing(below, AR)
    assert point is not None
    assert point.epoch == 4.0
    assert "did not cross" in verdict(AR, near)
    assert "From epoch 4" in verdict(AR, below)


def test_overtaking_compares_at_the_same_flops_and_extrapolates_nothing():
    crossing = overtaking(curve("masked diffusion", [6.0, 5.0, 4.9, 5.1]), AR)
    assert crossing is not None
    assert crossing.epoch == 4.0  # 5.1 against 5.2; at epoch 3 it is 4.9 against 4.8
    assert overtaking(curve("masked diffusion", [6.0, 5.0, 4.9, 5.19]), AR) is None
    late = Curve("masked diffusion", (Point(50.0, 50e9, 4.0, 0.01, 2.0),))
    assert overtaking(late, AR) is None


def test_overfitting_is_claimed_beyond_the_error_only():
    assert AR.overfits
    flat = curve("autoregressive", [5.0, 4.5, 4.51])
    assert not flat.overfits
    assert "did not measurably overfit" in verdict(flat, curve("masked diffusion", [5.0]))
    assert "overfits from there on" in verdict(AR, curve("masked diffusion", [5.0]))


def test_an_unknown_noise_error_is_never_taken_for_zero(tmp_path):
    """A single draw leaves it unknown; the error of text and noise together is larger."""
    shared = {"train/epoch": 1.0, "train/flops": 1e9, "validation/bits_per_byte": 2.0}
    errors = [{"noise_error": 0.0, "standard_error": 0.2}, {"standard_error": 0.2}, {}]
    lines = [
        shared | {"validation/nats_per_token": 4.0} | {f"validation/{k}": v for k, v in e.items()}
        for e in errors
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    points = read_curve(tmp_path, "masked diffusion").points
    assert [point.noise_error for point in points] == [0.0, 0.2, math.inf]
