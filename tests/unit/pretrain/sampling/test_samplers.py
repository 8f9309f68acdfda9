"""Samplers against a language with known probabilities; draws as functions of their key."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from pretrain.noise.key import NoiseKey
from pretrain.sampling.autoregressive import sample_autoregressive
from pretrain.sampling.draw import gumbel_argmax, sharpen
from pretrain.sampling.masked import sample_masked
from pretrain.vocabulary import TokenSpace

V, L, FIRST = 3, 3, 6
SPACE = TokenSpace(FIRST + V, 16, 0, 4, 5, (0, 1, 2, 3, 4))
JOINT = np.random.default_rng(1).dirichlet(np.ones(V**L) * 0.7).reshape((V,) * L)


@dataclass
class Chunk:
    logits: torch.Tensor


class TableModel:
    """Exact conditionals of JOINT in the place of a transformer.

    The "hidden state" of a position is its own index and everything the network may read.
    """

    space = SPACE

    def __call__(self, ids, positions, rule):
        b, s = ids.shape
        place = torch.arange(s).expand(b, s)[..., None]
        if rule.kind == "causal":  # [<doc>] + prefix: the last position predicts symbol s - 1
            seen = torch.full((b, s, L), SPACE.mask_id)
            for i in range(s):
                seen[:, i, :i] = ids[:, 1 : i + 1]
        else:
            seen = ids[:, None].expand(b, s, L)
        return torch.cat((place, seen), dim=-1).transpose(0, 1)

    def vocabulary(self, rows):
        logits = torch.full((len(rows), SPACE.vocab_size), -torch.inf, dtype=torch.float64)
        for i, row in enumerate(rows.tolist()):
            place, seen = row[0], row[1:]
            index = tuple(slice(None) if t == SPACE.mask_id else t - FIRST for t in seen)
            hidden = [j for j in range(L) if seen[j] == SPACE.mask_id]
            table = JOINT[index]
            other = tuple(a for a, j in enumerate(hidden) if j != place)
            p = table.sum(axis=other)
            logits[i, FIRST:] = torch.from_numpy(np.log(p / p.sum()))
        return Chunk(logits)


def frequencies(tokens: torch.Tensor) -> np.ndarray:
    counts = np.zeros((V,) * L)
    np.add.at(counts, tuple((tokens - FIRST).T.numpy()), 1)
    return counts


def chi_square(counts: np.ndarray, p: np.ndarray) -> float:
    """Standardised: about normal with mean 0 and deviation 1 when counts follow p."""
    expected = p * counts.sum()
    return float((((counts - expected) ** 2 / expected).sum() - (p.size - 1)) / np.sqrt(2 * p.size))


EMPTY = torch.zeros(4000, 0, dtype=torch.int64)


def test_autoregressive_samples_follow_the_joint_distribution():
    tokens, passes = sample_autoregressive(
        TableModel(), EMPTY, NoiseKey(0, torch.arange(4000)), length=L, cache=False
    )
    assert passes == L
    assert abs(chi_square(frequencies(tokens), JOINT)) < 4


def test_masked_samples_follow_the_product_of_marginals_in_one_step_and_the_joint_in_many():
    key = NoiseKey(0, torch.arange(4000))
    marginals = [JOINT.sum(axis=tuple(j for j in range(L) if j != i)) for i in range(L)]
    product = np.einsum("i,j,k->ijk", *marginals)
    at_once, evaluations = sample_masked(TableModel(), EMPTY, key, length=L, steps=1)
    assert abs(chi_square(frequencies(at_once), product)) < 4
    assert chi_square(frequencies(at_once), JOINT) > 20
    assert (evaluations == 1).all()
    one_by_one, evaluations = sample_masked(TableModel(), EMPTY, key, length=L, steps=1000)
    assert abs(chi_square(frequencies(one_by_one), JOINT)) < 4
    # Distinct forwards of T steps over L tokens: T (1 - (1 - 1/T)^L), at most L.
    expected = 1000 * (1 - (1 - 1 / 1000) ** L)
    assert abs(float(evaluations.double().mean()) - expected) < 0.01


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_no_mask_is_left_and_prompts_stay(steps):
    prompt = torch.tensor([[FIRST, FIRST + 2], [FIRST + 1, FIRST + 1]])
    tokens, _ = sample_masked(
        TableModel(), prompt, NoiseKey(3, torch.arange(2)), length=L, steps=steps
    )
    assert (tokens != SPACE.mask_id).all()
    assert torch.equal(tokens[:, :2], prompt)


def test_a_sample_does_not_depend_on_the_batch_it_was_drawn_in():
    empty = torch.zeros(6, 0, dtype=torch.int64)
    for draw in (
        lambda n, key: sample_masked(TableModel(), empty[:n], key, length=L, steps=4)[0],
        lambda n, key: sample_autoregressive(TableModel(), empty[:n], key, length=L, cache=False)[
            0
        ],
    ):
        together = draw(6, NoiseKey(5, torch.arange(6)))
        alone = torch.cat([draw(1, NoiseKey(5, torch.tensor([i]))) for i in range(6)])
        assert torch.equal(together, alone)
        assert not torch.equal(together, draw(6, NoiseKey(6, torch.arange(6))))


def test_nucleus_keeps_the_crossing_token():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    kept = [
        torch.isfinite(sharpen(logits, 1.0, p)).nonzero()[:, 0].tolist()
        for p in (0.4, 0.5, 0.7, 0.9, 1.0)
    ]
    assert kept == [[0], [0], [0, 1], [0, 1, 2], [0, 1, 2, 3]]


def test_sharpened_probabilities():
    logits = torch.log(torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)) + 7
    half = sharpen(logits, 0.5, 1.0).softmax(0)
    torch.testing.assert_close(half, torch.tensor([0.25, 0.09, 0.04]).double() / 0.38)
    assert sharpen(logits, 0.0, 1.0).softmax(0).tolist() == [1, 0, 0]


def test_draws_are_float64_only():
    """float32 uniforms cut the Gumbel tail and starve rare tokens; they are not accepted."""
    with pytest.raises(AssertionError):
        gumbel_argmax(torch.zeros(3), torch.rand(3))
    u = NoiseKey(0, torch.arange(1000)).fine_uniform("sample", 1000)
    assert u.dtype == torch.float64
    assert ((u * 2**33) % 1 != 0).double().mean() > 0.99  # finer than 32 bits


def test_gumbel_draws_at_a_temperature_are_a_power_of_uniforms():
    """I25: argmax exp(l) / (-log U)^T draws from softmax(l / T)."""
    logits, temperature, n = torch.tensor([1.0, 0.0, -1.0]), 0.7, 100_000
    u = NoiseKey(1, torch.arange(n)).fine_uniform("sample", 3)
    drawn = gumbel_argmax(sharpen(logits, temperature, 1.0).expand(n, 3), u)
    powers = logits.double().exp() / (-u.log()) ** temperature
    assert torch.equal(drawn, powers.argmax(dim=1))
    p = (logits.double() / temperature).softmax(0).numpy()
    assert abs(chi_square(np.bincount(drawn.numpy(), minlength=3).astype(float), p)) < 4


def test_the_tail_of_the_uniforms_reaches_tokens_of_any_probability():
    """A token of 1e-8 beside one of .999: float32 uniforms end at a Gumbel of 17, with which it
    would be drawn 65 times too rarely; 52 bits go on to 36."""
    log_p = torch.tensor([0.999, 1e-8], dtype=torch.float64).log()
    for bits, drawn in ((24, 0), (53, 1)):
        largest = torch.tensor([0.5, 1 - 2.0**-bits], dtype=torch.float64)
        assert int(gumbel_argmax(log_p, largest)) == drawn


def test_gumbel_draws_follow_their_probabilities():
    p = torch.tensor([0.9, 0.09, 0.009, 0.001], dtype=torch.float64)
    u = NoiseKey(0, torch.arange(100_000)).fine_uniform("sample", 4)
    counts = np.bincount(gumbel_argmax(p.log().expand(100_000, 4), u).numpy(), minlength=4)
    assert abs(chi_square(counts.astype(float), p.numpy())) < 4
    assert list(itertools.accumulate(counts))[-1] == 100_000


@pytest.mark.parametrize(
    "wrong",
    [
        {"seed": -1},
        {"seed": 2**63},
        {"num": 0},
    ],
)
def test_settings_out_of_range_are_refused_before_a_run_is_read(tmp_path, wrong):
    from pretrain.errors import ConfigError
    from pretrain.sampling.run import sample_run

    (name,) = wrong
    with pytest.raises(ConfigError, match=f"{name} is .*; allowed: "):
        sample_run(tmp_path / "none", **wrong)


@pytest.mark.parametrize(
    ("overrides", "values", "message"),
    [
        ([], {"steps": 0}, "steps: given 0, allowed: greater than or equal to 1"),
        ([], {"temperature": -1.0}, "temperature: given -1.0, allowed"),
        (["sampler.top_p=0"], {}, "top_p: given 0, allowed: greater than 0"),
        (["sampler=ancestal"], {}, "unknown sampler 'ancestal'; did you mean ancestral"),
        (["sampler.stps=4"], {}, "unknown key sampler.stps; did you mean sampler.steps"),
        (["objective=masked"], {}, "takes sampler=NAME and sampler.KEY=VALUE only"),
    ],
)
def test_settings_of_a_sampler_are_refused_with_what_is_allowed(overrides, values, message):
    from pretrain.config.compose import compose_component
    from pretrain.config.samplers import samplers
    from pretrain.errors import ConfigError

    with pytest.raises(ConfigError) as refused:
        compose_component(samplers, overrides, values)
    assert message in str(refused.value)


def test_single_keys_win_over_options_and_values_over_both():
    from pretrain.config.compose import compose_component
    from pretrain.config.samplers import samplers

    overrides = ["sampler=ancestral", "sampler.steps=4", "sampler.top_p=0.5"]
    got = compose_component(samplers, overrides, {"top_p": 0.9})
    assert (got.name, got.steps, got.top_p) == ("ancestral", 4, 0.9)
