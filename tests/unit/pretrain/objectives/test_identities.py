"""Bounds of the masked families summed over every corruption: no draws, every digit.

The families assemble all 7 sets of masks of a three-token language, and what each row answers
follows from its attention rule. Numbers T1 to T8 are those of `docs/identities.md`.
"""

import itertools
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import toy_language as toy

from pretrain.config.objectives import objectives
from pretrain.noise.key import NoiseKey
from pretrain.noise.schedule import COSINE, LINEAR, LOG_LINEAR
from pretrain.objectives import build_objective
from pretrain.objectives.attention_order import ordered, pair

L = toy.L
SUBSETS = [s for m in range(1, L + 1) for s in itertools.combinations(range(L), m)]
MASKS = torch.tensor([[l in s for l in range(L)] for s in SUBSETS])
COUNTS = MASKS.sum(dim=1).double()
WAYS = torch.tensor([float(math.comb(L, len(s))) for s in SUBSETS], dtype=torch.float64)


def objective(name, **fields):
    return build_objective(objectives.make(name=name, time_window=64, **fields), toy.SPACE)


def junk(shown):
    """Conditionals of no distribution: a table that contradicts itself, [L][V]."""
    seed = sum((v + 1) * 5**i for i, v in shown.items())
    return np.random.default_rng(seed).dirichlet(np.ones(toy.V), size=L)


def independent(shown):
    """Marginals, whatever is shown."""
    return np.stack([toy.JOINT.sum(tuple(j for j in range(L) if j != l)) for l in range(L)])


def orders(x, table):
    """Negative log-likelihoods of x when it is revealed in each of the 3! orders."""
    return np.array([
        -sum(math.log(table({j: x[j] for j in order[:i]})[l, x[l]]) for i, l in enumerate(order))
        for order in itertools.permutations(range(L))
    ])  # fmt: skip


def left_to_right(x, table):
    return -sum(math.log(table({j: x[j] for j in range(l)})[l, x[l]]) for l in range(L))


def losses(family, batch, table, count):
    """Weighted loss of each row of the batch [count], float64."""
    loss = family.token_bound(toy.reading_chunk(batch, table), batch.targets, batch.extra)
    out = torch.zeros(count, dtype=torch.float64)
    return out.index_add_(0, batch.sequence, loss * batch.weight.double())


def legendre(low=0.0, high=1.0, n=200):
    nodes, weights = np.polynomial.legendre.leggauss(n)
    return torch.from_numpy(low + (high - low) * (nodes + 1) / 2), torch.from_numpy(
        (high - low) * weights / 2
    )


@pytest.mark.parametrize("schedule", [LINEAR, COSINE], ids=lambda s: s.name)
def test_time_integrals_of_our_weights_are_those_of_fixed_counts(schedule):
    """T1: a set of m masks weighs (m-1)! (L-m)! / L! under the bound's weight, whatever the
    schedule; m! (L-m)! / (L+1)! under the simple loss in linear time, and L / m of that is
    L / (L+1) of the former (T5b). T6: log-linear's lacks 1e-3 of single tokens."""
    t, dt = legendre()
    noise, length = schedule.noise(t), 5
    clean = toy.clean_batch(torch.zeros(4000, length, dtype=torch.int64), range(4000))
    mask, weight = fixed(clean)
    for m in range(1, length + 1):
        elbo = math.factorial(m - 1) * math.factorial(length - m) / math.factorial(length)
        chance = noise**m * schedule.alpha(t) ** (length - m)
        assert float(dt @ (schedule.elbo_weight(t) * chance)) == pytest.approx(elbo, rel=1e-9)
        ours = weight[mask.sum(dim=1) == m].unique()
        assert ours.tolist() == [length / m]
        assert length / m / length / math.comb(length, m) == pytest.approx(elbo, rel=1e-12)
        simple = math.factorial(m) * math.factorial(length - m) / math.factorial(length + 1)
        if schedule is LINEAR:
            assert float(dt @ chance) == pytest.approx(simple, rel=1e-9)
            assert simple * length / m == pytest.approx(elbo * length / (length + 1), rel=1e-12)
    short = LOG_LINEAR.elbo_weight(t) * LOG_LINEAR.noise(t)
    assert float(dt @ short) == pytest.approx(1 - 1e-3, rel=1e-12)


def fixed(clean):
    from pretrain.objectives.base import fixed_count

    return fixed_count(clean, NoiseKey(1, clean.position), 64)


def masked_sum(x, table, loss):
    """The masked family's objective summed over all sets of masks, each with its probability."""
    family = objective("masked", loss=loss)
    clean = toy.clean_batch([x] * len(SUBSETS), range(len(SUBSETS)))
    if loss == "elbo":  # counts uniform on 1..L, as `fixed_count` draws them
        weight, chance = L / COUNTS, 1 / L / WAYS
    else:  # masked with probability t uniform on (0, 1)
        weight, chance = torch.ones_like(COUNTS), 1 / (L + 1) / WAYS
    batch = family._batch(clean, MASKS, weight)
    return float(chance @ losses(family, batch, table, len(SUBSETS)))


def test_masked_bound_is_the_likelihood_of_every_sequence_and_the_mean_over_orders_of_any_table():
    """T2, T3 and I20: no gap with exact conditionals; else the average code length over orders,
    to which a mixture over orders is at most equal. I22: bounds never promise too much."""
    promised = 0.0
    for x in toy.SEQUENCES:
        exact = masked_sum(x, toy.conditional, "elbo")
        assert exact == pytest.approx(-math.log(toy.JOINT[x]), rel=1e-12)
        each, bound = orders(x, junk), masked_sum(x, junk, "elbo")
        assert bound == pytest.approx(each.mean(), rel=1e-12)
        assert -math.log(np.exp(-each).mean()) < bound
        promised += math.exp(-bound)
    assert promised < 1


def test_simple_loss_of_independent_tokens_is_exactly_half_their_likelihood():
    """T5; of dependent tokens it is not."""
    marginals, halves = independent({}), []
    for x in toy.SEQUENCES:
        nll = -sum(math.log(marginals[l, x[l]]) for l in range(L))
        assert masked_sum(x, independent, "simple") == pytest.approx(nll / 2, rel=1e-12)
        halves.append(masked_sum(x, toy.conditional, "simple") + math.log(toy.JOINT[x]) / 2)
    assert max(abs(h) for h in halves) > 0.05


def block_sum(x, table, size):
    """The block family's bound over all non-empty sets of masks of every block."""
    family = objective("block", block_size=size)
    parts = [range(a, min(a + size, L)) for a in range(0, L, size)]
    choices = [
        [s for m in range(1, len(p) + 1) for s in itertools.combinations(p, m)] for p in parts
    ]
    rows = list(itertools.product(*choices))
    mask = torch.tensor([[any(l in s for s in row) for l in range(L)] for row in rows])
    weight = torch.tensor(
        [[len(parts[l // size]) / len(row[l // size]) for l in range(L)] for row in rows],
        dtype=torch.float64,
    )
    chance = torch.tensor(
        [
            math.prod(
                1 / len(p) / math.comb(len(p), len(s)) for p, s in zip(parts, row, strict=True)
            )
            for row in rows
        ],
        dtype=torch.float64,
    )
    clean = toy.clean_batch([x] * len(rows), range(len(rows)))
    batch = family._batch(clean, family._blocks(clean), mask, weight)
    return float(chance @ losses(family, batch, table, len(rows)))


def test_blocks_of_one_are_autoregressive_and_one_block_is_masked():
    """T7: for tables that contradict themselves too; exact conditionals give -log p at any size."""
    for x in ((0, 1, 2), (2, 2, 0), (1, 0, 0)):
        assert block_sum(x, junk, 1) == pytest.approx(left_to_right(x, junk), rel=1e-12)
        assert block_sum(x, junk, L) == pytest.approx(masked_sum(x, junk, "elbo"), rel=1e-12)
        for size in (1, 2, 3):
            exact = block_sum(x, toy.conditional, size)
            assert exact == pytest.approx(-math.log(toy.JOINT[x]), rel=1e-12)


def esoteric_sum(x, table, alpha0):
    """Both terms of the bound over all sets of masks, the diffusion term by quadrature."""
    family = objective("esoteric", alpha0=alpha0)
    n = len(SUBSETS)
    clean = toy.clean_batch([x] * n, range(n))
    key, one = NoiseKey(1, clean.position), torch.ones(n, 1, dtype=torch.float64)
    left = pair(clean, family._order(clean, MASKS, key, natural=True))
    sequential = losses(family, family._batch(clean, [(MASKS, one), None], left), table, n)
    total = float(((1 - alpha0) ** COUNTS * alpha0 ** (L - COUNTS)) @ sequential)
    if alpha0 > 0:
        shuffled = ordered(clean, family._order(clean, MASKS, key, natural=False))
        each = losses(family, family._batch(clean, [(MASKS, one)], shuffled), table, n)
        p, dp = legendre(1 - alpha0, 1.0)  # 1 - alpha_t; dt = dp / alpha0
        chance = p[:, None] ** COUNTS * (1 - p[:, None]) ** (L - COUNTS)
        total += float((dp / p) @ chance @ each)
    return total


def test_esoteric_is_masked_at_one_and_autoregressive_at_zero():
    """T8, between them -log p for exact conditionals and the sum of both terms for any table."""
    for x in ((0, 1, 2), (2, 2, 0)):
        assert esoteric_sum(x, junk, 1.0) == pytest.approx(masked_sum(x, junk, "elbo"), rel=1e-9)
        assert esoteric_sum(x, junk, 0.0) == pytest.approx(left_to_right(x, junk), rel=1e-12)
        for alpha0 in (0.25, 0.7):
            exact = esoteric_sum(x, toy.conditional, alpha0)
            assert exact == pytest.approx(-math.log(toy.JOINT[x]), rel=1e-9)
    ends = [esoteric_sum((0, 1, 2), junk, a) for a in (0.0, 0.5, 1.0)]
    assert len({round(e, 6) for e in ends}) == 3


def test_the_bound_of_a_single_token_is_its_likelihood_in_every_draw():
    """I21: one token is always masked and weighs one, so that no draw differs from another."""
    for name, fields in (("masked", {}), ("block", {"block_size": 4}), ("esoteric", {})):
        family = objective(name, **fields)
        clean = toy.clean_batch(torch.zeros(50, 1, dtype=torch.int64), range(50))
        batch = family.bound_batch(clean, NoiseKey(3, clean.position))
        assert (batch.weight == 1).all() and len(batch.rows) == 50
        assert (batch.ids[:, 0] == toy.SPACE.mask_id).all()


@pytest.mark.parametrize(
    ("name", "fields"),
    [("masked", {}), ("block", {"block_size": 2}), ("esoteric", {}), ("esoteric", {"alpha0": 0.5})],
)
def test_documents_kept_apart_are_scored_apart(name, fields):
    """A token of the first document and two of the second: the bound of the sequence is that of
    both, as if neither were there for the other."""
    family, n, x = objective(name, **fields), 4000, (0, 1, 2)
    clean = toy.clean_batch([x] * n, range(n))
    clean.segment[:, 1:] = 1
    clean = type(clean)(**{**clean.__dict__, "one_segment": False})
    first, rest = toy.JOINT.sum(axis=(1, 2)), toy.JOINT.sum(axis=0)

    def table(shown):
        """What is known is by place in the sequence; a document knows nothing of the other."""
        inside = {j - 1: v for j, v in shown.items() if j > 0}
        other = [rest.sum(axis=1), rest.sum(axis=0)]
        if 1 in inside:
            other[0] = rest[:, inside[1]]
        if 0 in inside:
            other[1] = rest[inside[0]]
        return np.stack([p / p.sum() for p in (first, *other)])

    batch = family.bound_batch(clean, NoiseKey(1, clean.position))
    copies = batch.ids.shape[1] // L
    assert batch.positions[0].tolist() == [0, 0, 1] * copies
    placed = type(batch)(**{**batch.__dict__, "positions": torch.arange(L).repeat(copies)[None]})
    seen = [toy.known_to(placed, row) for row in placed.rows[:40].tolist()]
    assert any(seen) and not any(0 in known for known in seen)
    each = losses(family, placed, table, n)
    want = -math.log(first[x[0]]) - math.log(rest[x[1], x[2]])
    error = float(each.std()) / math.sqrt(n)
    assert error < 0.05 and abs(float(each.mean()) - want) < 4 * error + 1e-12


def test_the_table_names_every_identity_and_only_tests_that_exist():
    """`docs/identities.md`: T1 to T25, I1 to I45, and a function for each name it gives."""
    unit = Path(__file__).parents[1]
    text = (Path(__file__).parents[4] / "docs" / "identities.md").read_text()
    for letter, last in (("T", 25), ("I", 45)):
        found = set()
        for first, until in re.findall(rf"\b{letter}(\d+)(?:-{letter}(\d+))?\b", text):
            found |= set(range(int(first), int(until or first) + 1))
        assert found == set(range(1, last + 1)), letter
    names = re.findall(r"`(\S+\.py)::(\w+)`", text)
    assert len(names) > 60
    for file, name in names:
        assert f"\ndef {name}(" in (unit / file).read_text(), f"{file}::{name}"
