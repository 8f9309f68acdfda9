"""Errors of a likelihood mean what they say, on a law whose true errors are known exactly.

The law: independent tokens, scored under their own frequencies by the fixed-count bound, with
noise levels stratified as the product stratifies them. Every replica is an evaluation of another
text. Given a text, (L / m) times the loss of m random tokens has the variance of a sum drawn
without replacement, so the true variance is a sum over the counts m of each stratum.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from pretrain.batch import CleanBatch
from pretrain.evaluation.likelihood import EVALUATION_WINDOW, summarize
from pretrain.noise.key import NoiseKey
from pretrain.noise.time import stratified_time
from pretrain.objectives.base import fixed_count

FREQUENCIES = np.array([0.4, 0.3, 0.2, 0.1])
LOSSES = -np.log(FREQUENCIES)
ENTROPY = float(FREQUENCIES @ LOSSES)
SPREAD = float(FREQUENCIES @ LOSSES**2) - ENTROPY**2


class Law:
    """Replicas of an evaluation of some sequences of independent tokens."""

    def __init__(
        self, length: int, draws: int, replicas: int, sequences: int, slope: float = 0.0
    ) -> None:
        """With a `slope` the loss of a token also rises with the share of masked tokens."""
        rng = np.random.default_rng(length + draws)
        shape, count = (replicas, sequences), np.arange(1, length + 1)
        self.length = length
        text = rng.multinomial(length, FREQUENCIES, size=shape)
        losses = text @ LOSSES
        self.expected = losses.sum(axis=1)  # over noise, for each text
        variance = text @ LOSSES**2 / length - (losses / length) ** 2
        self.bounds = np.empty((draws, *shape))
        self.noise_variance = np.zeros(replicas)
        for draw in range(draws):
            masked = np.minimum((levels(shape, draw, draws) * length).astype(int) + 1, length)
            left, rest, loss = masked.copy(), np.full(shape, length), np.zeros(shape)
            for number, price in zip(np.moveaxis(text, 2, 0)[:-1], LOSSES, strict=False):
                hit = rng.hypergeometric(number, rest - number, left)
                loss, left, rest = loss + price * hit, left - hit, rest - number
            loss += LOSSES[-1] * left
            self.bounds[draw] = loss * (length / masked)
            self.bounds[draw] += slope * length * (masked - (length + 1) / 2) / length
            inside = np.clip(
                np.minimum(count, (draw + 1) / draws * length)
                - np.maximum(count - 1, draw / draws * length),
                0,
                None,
            )
            exact = length**2 / count * (length - count) / (length - 1)
            self.noise_variance += variance.sum(axis=1) * float(inside @ exact / inside.sum())

    def summaries(self):
        """What the product reports of every replica."""
        tokens = np.full(self.bounds.shape[2], self.length)
        total = int(tokens.sum())
        return [
            summarize(self.bounds[:, i], tokens, total, is_bound=True)
            for i in range(self.bounds.shape[1])
        ]

    def check(self, *, low: float = 0.97, high: float = 1.05, inside=(0.94, 0.97)) -> str:
        """Compare both errors with the truth: their mean, and how often twice of them covers it."""
        draws, _, sequences = self.bounds.shape
        total, found = self.length * sequences, self.summaries()
        nats = np.array([r.nats_per_token for r in found])
        noise = self.noise_variance.mean() / draws**2
        text = SPREAD * total
        cases = {"standard": ([r.standard_error for r in found], noise + text, ENTROPY)}
        if draws > 1:
            cases["noise"] = ([r.noise_error for r in found], noise, self.expected / total)
        line = f"L {self.length}, {draws} draws"
        for name, (reported, variance, truth) in cases.items():
            errors = np.array(reported, float)
            ratio = errors.mean() / (math.sqrt(variance) / total)
            covered = float((np.abs(nats - truth) < 2 * errors).mean())
            line += f"; {name} error: ratio {ratio:.3f}, coverage {covered:.3f}"
            assert low <= ratio <= high, line
            assert inside[0] <= covered <= inside[1], line
        return line


def levels(shape: tuple[int, int], draw: int, draws: int) -> np.ndarray:
    """Noise levels of a draw, [replicas, sequences]: each replica takes further whole windows."""
    replicas, sequences = shape
    assert sequences % EVALUATION_WINDOW == 0
    found = [
        stratified_time(NoiseKey(0, positions, draw, stratum=(draw, draws)), EVALUATION_WINDOW)
        for positions in torch.arange(replicas * sequences).split(100 * sequences)
    ]
    return torch.cat(found).view(shape).numpy()


@pytest.mark.parametrize("draws", [1, 2, 3, 4, 8])
def test_errors_are_honest(draws):
    """A few hundred replicas tell 0.87 from 1, which is what successive differences reported."""
    Law(64, draws, 300, 128).check(low=0.95, high=1.05, inside=(0.918, 0.99))  # 3 sigma


@pytest.mark.slow
@pytest.mark.parametrize("draws", [1, 2, 3, 4, 5, 7, 8, 32])
@pytest.mark.parametrize("length", [64, 256, 1024])
def test_errors_are_honest_to_a_few_percent(length, draws):
    print(Law(length, draws, 4000, 256).check())


@pytest.mark.parametrize("draws", [2, 3, 4])
def test_errors_err_upwards_where_the_loss_depends_on_the_level(draws):
    """Strata then differ in mean, and stratification takes away more than the errors know."""
    Law(64, draws, 200, 128, slope=0.5).check(low=1.0, high=math.inf, inside=(0.94, 1.0))


def test_the_law_masks_as_the_bound_does():
    """Counts of masks are those of `fixed_count`, sequence by sequence."""
    length, sequences, draws = 64, 128, 4
    everywhere = torch.ones(sequences, length, dtype=torch.bool)
    clean = CleanBatch(
        tokens=everywhere.long(),
        position=torch.arange(sequences),
        segment=everywhere.int(),
        valid=everywhere,
        all_valid=True,
    )
    for draw in range(draws):
        noise = NoiseKey(0, clean.position, draw, stratum=(draw, draws))
        mask, weight = fixed_count(clean, noise, EVALUATION_WINDOW)
        count = (levels((1, sequences), draw, draws)[0] * length).astype(int) + 1
        assert mask.sum(dim=1).tolist() == count.tolist()
        assert weight.tolist() == (length / count).tolist()


def test_a_pair_counts_once_and_three_draws_are_one_group():
    """The estimate in closed form: sum d^2 / D^2, and of three draws 3/2 of the sum of squares."""
    rng, tokens = np.random.default_rng(0), np.array([5, 10, 10])
    for draws, groups in ((2, [[0, 1]]), (4, [[0, 1], [2, 3]]), (3, [[0, 1, 2]]),
                          (5, [[0, 1], [2, 3, 4]]), (7, [[0, 1], [2, 3], [4, 5, 6]])):  # fmt: skip
        bounds = rng.normal(size=(draws, 3))
        want = 0.0
        for group in groups:
            each = bounds[group]
            pair = ((each[0] - each[1]) ** 2).sum()
            three = 1.5 * ((each - each.mean(axis=0)) ** 2).sum()
            want += float(pair if len(group) == 2 else three)
        result = summarize(bounds, tokens, 25, is_bound=True)
        assert result.noise_error == pytest.approx(math.sqrt(want) / draws / 25)


def test_an_error_that_cannot_be_known_is_none_and_not_zero():
    one = summarize(np.array([[1.0, 2.0]]), np.array([2, 2]), 4, is_bound=True)
    assert one.noise_error is None
    assert "validation/noise_error" not in one.metrics("validation")
    alone = summarize(np.array([[1.0], [2.0]]), np.array([2]), 4, is_bound=True)
    assert alone.standard_error is None and alone.noise_error is not None
    assert "validation/standard_error" not in alone.metrics("validation")
    again = summarize(
        np.array([[1.0, 2.0]]), np.array([2, 2]), 4, is_bound=True, texts=np.array([7, 7])
    )
    assert again.standard_error is None


def test_repeated_texts_are_one_sample():
    """Four passes over a text know no more of other texts than one pass does."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(20, 64, 60)
    once = rng.normal(100, 10, (1, 60))
    whole = summarize(once, tokens, 1, is_bound=False)
    repeated = summarize(
        np.tile(once, 4), np.tile(tokens, 4), 4, is_bound=False, texts=np.tile(np.arange(60), 4)
    )
    assert repeated.nats_per_token == pytest.approx(whole.nats_per_token)
    assert repeated.standard_error == pytest.approx(whole.standard_error)
    naive = summarize(np.tile(once, 4), np.tile(tokens, 4), 4, is_bound=False)
    assert naive.standard_error < 0.51 * whole.standard_error
