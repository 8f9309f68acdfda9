"""A sampler with a cache of keys and values against the same sampler without one."""

import pytest
import torch

from pretrain.batch import AttentionRule
from pretrain.config.run import ModelConfig
from pretrain.noise.key import NoiseKey
from pretrain.sampling import ordered
from pretrain.sampling.autoregressive import sample_autoregressive
from pretrain.sampling.cache import Cached, Uncached
from pretrain.sampling.ordered import sample_block, sample_esoteric
from pretrain.vocabulary import TokenSpace

SPACE = TokenSpace(20, 128, 0, 4, 5, (0, 1, 2, 3, 4))
ROWS, LENGTH = 3, 13
CASES = [
    (sample_block, {"block_size": 4, "steps": 3}),
    (sample_block, {"block_size": 1, "steps": 1}),
    (sample_block, {"block_size": 13, "steps": 5}),
    (sample_esoteric, {"alpha0": 1.0, "steps": 6}),
    (sample_esoteric, {"alpha0": 0.5, "steps": 4}),
    (sample_esoteric, {"alpha0": 0.0, "steps": 1}),
]


def built(topology, **changes):
    from pretrain.model.initialize import initialize
    from pretrain.model.transformer import Transformer

    config = ModelConfig(
        num_layers=3,
        hidden_size=32,
        num_attention_heads=4,
        num_query_groups=2,
        init_std=0.4,
        **changes,
    )
    model = Transformer(config, SPACE, topology, causal=changes.get("short_convolution") == 4)
    initialize(model, seed=3)
    return model.eval()


@pytest.fixture(scope="module")
def model(topology):
    return built(topology)


@pytest.fixture(scope="module")
def symmetric(topology):
    """With short convolutions on both sides of a token."""
    return built(topology, short_convolution=5)


@pytest.fixture(scope="module")
def causal(topology):
    """With short convolutions that look back."""
    return built(topology, short_convolution=4)


def named(value):
    """An id that is the same in every process."""
    return value.__name__ if callable(value) else str(value)


class Both(Cached):
    """Answers from the cache, and checks each answer against a pass over the whole sequence."""

    computed = asked = 0

    def hidden(self, ids, rule, wanted):
        cached = super().hidden(ids, rule, wanted)
        whole = Uncached(self.model).hidden(ids, rule, wanted)
        torch.testing.assert_close(cached, whole, rtol=1e-5, atol=1e-5)
        self.asked += 1
        return cached

    def at(self, ids, rows, places, mask):
        self.computed += places.numel()
        return super().at(ids, rows, places, mask)


@pytest.mark.parametrize(("draw", "fields"), CASES, ids=named)
def test_every_answer_of_the_cache_is_that_of_the_whole_sequence(model, monkeypatch, draw, fields):
    """Also with a prompt, in rows that reveal different numbers of tokens a step."""
    opened = []

    def both(model, rows, length, cache):
        opened.append(Both(model, rows, length))
        return opened[-1]

    prompt = torch.randint(6, 20, (ROWS, 2), generator=torch.Generator().manual_seed(1))
    key = NoiseKey(7, torch.arange(ROWS))
    plain, passes = draw(model, prompt, key, length=LENGTH, cache=False, **fields)
    monkeypatch.setattr(ordered, "site_model", both)
    tokens, cached_passes = draw(model, prompt, key, length=LENGTH, **fields)
    assert torch.equal(tokens, plain) and torch.equal(passes, cached_passes)
    assert opened[0].asked > 0
    if fields.get("block_size") != LENGTH:  # one block has nothing to keep before it is finished
        assert opened[0].computed < opened[0].asked * ROWS * LENGTH / 2


@pytest.mark.parametrize(("draw", "fields"), [CASES[0], CASES[4]], ids=named)
def test_neighbours_come_from_the_cache(symmetric, monkeypatch, draw, fields):
    test_every_answer_of_the_cache_is_that_of_the_whole_sequence(
        symmetric, monkeypatch, draw, fields
    )


def test_autoregressive_neighbours_come_from_the_cache(causal, monkeypatch):
    test_autoregressive_computes_each_token_once(causal, monkeypatch)


def test_autoregressive_computes_each_token_once(model, monkeypatch):
    computed = []
    at = Cached.at
    monkeypatch.setattr(
        Cached, "at", lambda self, ids, *rest: computed.append(ids.shape[1]) or at(self, ids, *rest)
    )
    prompt = torch.randint(6, 20, (ROWS, 3), generator=torch.Generator().manual_seed(1))
    key = NoiseKey(7, torch.arange(ROWS))
    plain, _ = sample_autoregressive(model, prompt, key, length=LENGTH, cache=False)
    cached, passes = sample_autoregressive(model, prompt, key, length=LENGTH)
    assert torch.equal(plain, cached)
    assert computed == [4] + [1] * (LENGTH - 4) and passes == LENGTH - 3


def test_a_cache_changes_nothing_but_its_passes(model):
    """Two caches and passes without one take turns on the same model."""
    ids = torch.randint(6, 20, (2, 9), generator=torch.Generator().manual_seed(2))
    places, rule = torch.arange(9).expand(2, -1), AttentionRule("bidirectional")
    whole = model(ids, places[:1], rule)
    rows = torch.arange(2)
    caches = [Cached(model, 2, 9), Cached(model, 2, 9)]
    mask = torch.arange(9) <= places[..., None]
    reference = model(ids, places[:1], AttentionRule("causal"))
    for start in range(0, 9, 3):
        for cache, given in zip(caches, (ids, ids.flip(0)), strict=True):
            part = slice(start, start + 3)
            new = cache.at(given[:, part], rows, places[:, part], mask[:, part])
            assert torch.equal(model(ids, places[:1], rule), whole)
            wanted = reference if cache is caches[0] else reference.flip(1)
            torch.testing.assert_close(new, wanted[part], rtol=1e-5, atol=1e-5)
