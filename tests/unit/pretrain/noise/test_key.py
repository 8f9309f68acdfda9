"""Philox against published vectors and numpy; draws as pure functions of their place."""

import numpy as np
import pytest
import torch

from pretrain.noise.key import NoiseKey, philox, stream_key

GOLDEN = [
    [1340168012, 3256558335, 4111584994, 733532506, 104602235, 3655271524],
    [3771800411, 2502108610, 739552026, 2983516848, 2301904941, 3025700571],
    [80181314, 3595816405, 1173377788, 1006947498, 2318501374, 2865927545],
]

# Random123's known-answer tests for philox4x32-10: counter, key, output.
KNOWN = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


def reference(counter, key, bits, multipliers, weyl):
    """Philox-4x(bits)-10 on Python integers."""
    c, k, word = list(counter), list(key), (1 << bits) - 1
    for _ in range(10):
        p0, p1 = multipliers[0] * c[0], multipliers[1] * c[2]
        c = [(p1 >> bits) ^ c[1] ^ k[0], p1 & word, (p0 >> bits) ^ c[3] ^ k[1], p0 & word]
        k = [(k[0] + weyl[0]) & word, (k[1] + weyl[1]) & word]
    return c


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_philox_gives_the_published_words(counter, key, expected):
    words = philox(tuple(torch.tensor([c]) for c in counter), tuple(key))
    assert [int(w) for w in words] == expected


def test_philox_agrees_with_numpy_through_a_reference_of_both_widths():
    """numpy has the 64-bit variant: the same reference code must give it and our 32-bit words."""
    bit_generator = np.random.Philox(
        key=[0x123456789ABCDEF, 0xFEDCBA987654321], counter=[6, 0, 0, 0]
    )
    # numpy increments its counter before the first block.
    ours = reference(
        [7, 0, 0, 0],
        [0x123456789ABCDEF, 0xFEDCBA987654321],
        64,
        (0xD2E7470EE14C6C93, 0xCA5A826395121157),
        (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B),
    )
    assert ours == [int(w) for w in bit_generator.random_raw(4)]
    rng = np.random.default_rng(0)
    for _ in range(200):
        counter = rng.integers(0, 2**32, 4).tolist()
        key = rng.integers(0, 2**32, 2).tolist()
        expected = reference(counter, key, 32, (0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85))
        words = philox(tuple(torch.tensor([c]) for c in counter), tuple(key))
        assert [int(w) for w in words] == expected


def test_many_words_are_those_of_a_few_at_a_time():
    """numpy makes few words, torch many."""
    positions = torch.arange(300)
    together = NoiseKey(7, positions).words("mask", 600)
    few = [NoiseKey(7, part).words("mask", 600) for part in positions.split(50)]
    assert torch.equal(together, torch.cat(few))


def test_draws_depend_on_the_position_alone_not_on_the_batch():
    positions = torch.tensor([5, 2**40 + 3, 0, 17])
    together = NoiseKey(7, positions).uniform("mask", 13)
    for row, position in enumerate(positions.tolist()):
        alone = NoiseKey(7, torch.tensor([position])).uniform("mask", 13)
        assert torch.equal(alone[0], together[row])
    # A longer draw extends a shorter one: padding a sequence changes none of its noise.
    assert torch.equal(NoiseKey(7, positions).uniform("mask", 40)[:, :13], together)


def test_seed_stream_draw_and_attempt_are_independent_dimensions():
    key = NoiseKey(7, torch.arange(64))
    base = key.uniform("a", 64)
    others = [
        NoiseKey(8, torch.arange(64)).uniform("a", 64),
        key.uniform("b", 64),
        key.uniform("a", 64, draw=1),
        NoiseKey(7, torch.arange(64), attempt=1).uniform("a", 64),
        NoiseKey(7, torch.arange(64) + 2**32).uniform("a", 64),
    ]
    for other in others:
        correlation = np.corrcoef(base.flatten().numpy(), other.flatten().numpy())[0, 1]
        assert abs(correlation) < 4 / 64
    assert stream_key(7, "ab") != stream_key(7, "ba")


def test_uniforms_and_normals_have_their_distribution():
    key = NoiseKey(3, torch.arange(1000))
    u = key.uniform("u", 1000).flatten().numpy()
    fine = key.fine_uniform("u", 1000).flatten().numpy()
    z = key.normal("z", 1001)[:, :1000].flatten().numpy()
    for values in (u, fine):
        assert values.min() > 0 and values.max() < 1
        counts = np.bincount((values * 100).astype(int), minlength=100)
        chi2 = ((counts - 1e4) ** 2 / 1e4).sum()
        assert abs(chi2 - 99) < 5 * np.sqrt(2 * 99)
    assert abs(z.mean()) < 4e-3
    assert abs(z.var() - 1) < 4 * np.sqrt(2e-6)
    assert abs((z**4).mean() - 3) < 4 * np.sqrt(96e-6)
    assert np.unique(fine).size == fine.size  # 32 bits would collide about a hundred times


def test_golden_words_freeze_the_stream():
    """Changing any of these numbers silently changes every published run."""
    words = NoiseKey(17, torch.tensor([0, 1, 2**33])).words("mask", 6, draw=2)
    assert words.tolist() == GOLDEN
