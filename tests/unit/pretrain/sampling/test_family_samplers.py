"""Samplers of the further families against a language with known probabilities."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from pretrain.config.objectives import objectives
from pretrain.noise.key import NoiseKey
from pretrain.objectives import build_objective
from pretrain.sampling.interpolating import sample_interpolating
from pretrain.sampling.ordered import sample_block, sample_esoteric
from pretrain.vocabulary import TokenSpace

V, L, FIRST = 3, 3, 6
SPACE = TokenSpace(FIRST + V, 16, 0, 4, 5, (0, 1, 2, 3, 4))
# <doc> is a possible target too, so the language for uniform noise has four symbols.
SYMBOLS = [5, 6, 7, 8]
JOINT = np.random.default_rng(1).dirichlet(np.ones(V**L) * 0.7).reshape((V,) * L)
PAIRS = np.random.default_rng(2).dirichlet(np.ones(16) * 0.7).reshape(4, 4)


@dataclass
class Chunk:
    logits: torch.Tensor


class LeaveOneOutModel:
    """p(x^l | z^(-l)) of PAIRS at the noise level it is given."""

    space = SPACE

    def __init__(self, process, grid):
        self.process = process
        self.grid = list(grid)
        self.calls = 0

    def __call__(self, ids, positions, rule, level):
        t = self.grid[self.calls]
        self.calls += 1
        assert rule.kind == "bidirectional"
        alpha, r, _ = self.process.masses(torch.tensor(t, dtype=torch.float64))
        assert abs(float(level[0]) - min(7.0, -float(alpha.log()))) < 1e-5
        q = float(alpha) * np.eye(4) + float(r)
        out = torch.full((2, SPACE.padded_vocab_size, SPACE.padded_vocab_size), -torch.inf)
        for l, joint in enumerate((PAIRS, PAIRS.T)):
            for other in (SPACE.mask_id, *SYMBOLS):
                word = np.ones(4) if other == SPACE.mask_id else q[:, SYMBOLS.index(other)]
                out[l, other, SYMBOLS] = torch.from_numpy(np.log(joint @ word)).float()
        return torch.stack((out[0, ids[:, 1]], out[1, ids[:, 0]])).double()

    def vocabulary(self, rows):
        return Chunk(rows)


def chi_square(counts, p):
    expected = p * counts.sum()
    return float((((counts - expected) ** 2 / expected).sum() - (p.size - 1)) / np.sqrt(2 * p.size))


@pytest.mark.parametrize(
    ("name", "fields"),
    [("uniform", {})] + [("interpolating", {"noise": n}) for n in ("balanced", "hybrid", "masked")],
)
def test_ancestral_samples_follow_the_joint_distribution(name, fields):
    """With the leave-one-out predictive; in many steps, because one draws positions apart."""
    process = build_objective(objectives.make(name=name, **fields), SPACE).process
    n, steps = 1500, 60
    model = LeaveOneOutModel(process, np.linspace(1, 0, steps + 1)[:-1])
    empty = torch.zeros(n, 0, dtype=torch.int64)
    tokens, passes = sample_interpolating(
        model, process, empty, NoiseKey(0, torch.arange(n)), length=2, steps=steps
    )
    assert passes == steps == model.calls
    index = np.array([[SYMBOLS.index(t) for t in row] for row in tokens.tolist()])
    counts = np.zeros((4, 4))
    np.add.at(counts, tuple(index.T), 1)
    assert abs(chi_square(counts, PAIRS)) < 4


def test_one_step_of_uniform_diffusion_draws_the_marginals_and_keeps_the_prompt():
    process = build_objective(objectives.make(name="uniform"), SPACE).process
    n = 3000
    prompt = torch.full((n, 1), 7)
    tokens, _ = sample_interpolating(
        LeaveOneOutModel(process, [1.0]), process, prompt, NoiseKey(0, torch.arange(n)),
        length=2, steps=1,
    )  # fmt: skip
    assert (tokens[:, 0] == 7).all()
    counts = np.bincount(tokens[:, 1].numpy(), minlength=9)[SYMBOLS].astype(float)
    # At t = 1 the prompt is taken for noise like everything else.
    assert abs(chi_square(counts, PAIRS.sum(axis=0))) < 4


def test_a_greedy_tail_is_the_mode_of_the_posterior_and_not_of_x_theta():
    """After one step from pure noise both are the mode of the marginals, in every sample; at low
    noise the token on the page is evidence, which x_theta alone does not have."""
    process = build_objective(objectives.make(name="uniform"), SPACE).process
    n = 200
    tokens, _ = sample_interpolating(
        LeaveOneOutModel(process, [1.0]), process, torch.zeros(n, 0, dtype=torch.int64),
        NoiseKey(0, torch.arange(n)), length=2, steps=1, greedy_tail=True,
    )  # fmt: skip
    modes = [SYMBOLS[int(PAIRS.sum(axis=axis).argmax())] for axis in (1, 0)]
    assert tokens.tolist() == [modes] * n
    x_theta = torch.zeros(1, SPACE.padded_vocab_size, dtype=torch.float64)
    x_theta[0, SYMBOLS] = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    ends = (torch.tensor([v], dtype=torch.float64) for v in (0.1, 0.0))
    posterior = process.reverse(x_theta, torch.tensor([SYMBOLS[3]]), *ends)
    assert int(posterior.argmax()) == SYMBOLS[3] != int(x_theta.argmax())


class Undecided:
    """Sure of the next symbol at every position, whatever stands there: what a network says of
    positions that its training never scores."""

    space = SPACE

    def __call__(self, ids, positions, rule, level):
        return ids.t()

    def vocabulary(self, ids):
        logits = torch.full((len(ids), SPACE.padded_vocab_size), -torch.inf, dtype=torch.float64)
        logits[:, SYMBOLS] = 0.0
        nearest = (ids - SYMBOLS[0] + 1) % len(SYMBOLS) + SYMBOLS[0]
        return Chunk(logits.scatter(1, nearest[:, None], 6.0))


@pytest.mark.parametrize("fields", [{"top_p": 0.5}, {"temperature": 0.0}])
@pytest.mark.parametrize(
    "noise", [{"noise": "masked"}, {"noise": "hybrid", "uniform_share": 0.0}, {"noise": "balanced"}]
)
def test_a_nucleus_without_the_visible_token_draws_text_all_the_same(noise, fields):
    process = build_objective(objectives.make(name="interpolating", **noise), SPACE).process
    tokens, _ = sample_interpolating(
        Undecided(), process, torch.full((8, 1), 8), NoiseKey(0, torch.arange(8)),
        length=6, steps=8, **fields,
    )  # fmt: skip
    assert set(tokens.flatten().tolist()) <= set(SYMBOLS) and (tokens[:, 0] == 8).all()
    if process.mask_only:  # what was revealed stays: the symbol after <mask> in every place
        assert (tokens[:, 1:] == (SPACE.mask_id - SYMBOLS[0] + 1) % 4 + SYMBOLS[0]).all()


class ReadingModel:
    """Exact conditionals of JOINT given exactly what the attention rule lets each position know."""

    space = SPACE

    def __call__(self, ids, positions, rule):
        mask = rule.mask()[:, 0].numpy()
        out = torch.full(
            (ids.shape[1], len(ids), SPACE.vocab_size), -torch.inf, dtype=torch.float64
        )
        for b, row in enumerate(ids.tolist()):
            for l in range(L):
                known = {k: row[k] - FIRST for k in range(L) if mask[b, l, k] and row[k] >= FIRST}
                if l in known:
                    continue
                table = JOINT[tuple(known.get(i, slice(None)) for i in range(L))]
                hidden = [i for i in range(L) if i not in known]
                p = table.sum(axis=tuple(a for a, i in enumerate(hidden) if i != l))
                out[l, b, FIRST:] = torch.from_numpy(np.log(p / p.sum()))
        return out

    def vocabulary(self, rows):
        return Chunk(rows)


def frequencies(tokens):
    counts = np.zeros((V,) * L)
    np.add.at(counts, tuple((tokens - FIRST).T.numpy()), 1)
    return counts


@pytest.mark.parametrize(
    ("draw", "fields", "passes"),
    [
        (sample_block, {"block_size": 1, "steps": 1}, 3.0),
        (sample_block, {"block_size": 2, "steps": 300}, 3 - 1 / 300),
        (sample_esoteric, {"alpha0": 0.0, "steps": 1}, 3.0),
        (sample_esoteric, {"alpha0": 1.0, "steps": 300}, 3 - 3 / 300),
        (sample_esoteric, {"alpha0": 0.5, "steps": 300}, 3 - 3 / 4 / 300),
    ],
)
def test_ordered_samples_follow_the_joint_distribution(draw, fields, passes):
    n = 1500
    empty = torch.zeros(n, 0, dtype=torch.int64)
    tokens, evaluations = draw(
        ReadingModel(), empty, NoiseKey(4, torch.arange(n)), length=L, cache=False, **fields
    )
    assert abs(chi_square(frequencies(tokens), JOINT)) < 4
    assert abs(float(evaluations.double().mean()) - passes) < 0.03


def test_one_step_blocks_draw_the_product_inside_and_the_chain_between():
    n = 3000
    tokens, evaluations = sample_block(
        ReadingModel(), torch.zeros(n, 0, dtype=torch.int64), NoiseKey(4, torch.arange(n)),
        length=L, block_size=2, steps=1, cache=False,
    )  # fmt: skip
    first, second = JOINT.sum(axis=(1, 2)), JOINT.sum(axis=(0, 2))
    third = JOINT / JOINT.sum(axis=2, keepdims=True)
    expected = first[:, None, None] * second[None, :, None] * third
    assert abs(chi_square(frequencies(tokens), expected)) < 4
    assert (evaluations == 2).all()


@pytest.mark.parametrize(
    ("draw", "fields"),
    [(sample_block, {"block_size": 2, "steps": 2}), (sample_esoteric, {"alpha0": 0.5, "steps": 2})],
)
def test_prompts_stay_and_samples_do_not_depend_on_their_batch(draw, fields):
    prompt = torch.tensor([[FIRST], [FIRST + 1], [FIRST + 2]])
    fields = {"length": L, "cache": False, **fields}
    whole, _ = draw(ReadingModel(), prompt, NoiseKey(5, torch.arange(3)), **fields)
    assert torch.equal(whole[:, :1], prompt) and (whole >= FIRST).all()
    for i in range(3):
        key = NoiseKey(5, torch.tensor([i]))
        alone, _ = draw(ReadingModel(), prompt[i : i + 1], key, **fields)
        assert torch.equal(alone[0], whole[i])
