"""Gaussian diffusion against languages with known probabilities, in float64 and by quadrature.

A stand-in for the transformer answers log p(x^l | the other noisy tokens); with the output prior
that is the exact posterior, whose bound must be H(x) + KL(q(z_1) || N(0, 1)) and nothing more.
"""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from points import CIRCLE, SKEW, clean_batch, language, real_module

from pretrain.config.objectives import objectives
from pretrain.config.run import Config, ModelConfig
from pretrain.noise.key import NoiseKey
from pretrain.noise.learned import LearnedSchedule, Level


def grid(size, n=32):
    """Nodes [n^size, size] and weights of a standard normal."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(n)
    axes = np.meshgrid(*[nodes] * size, indexing="ij")
    product = np.meshgrid(*[weights / weights.sum()] * size, indexing="ij")
    points = np.stack([a.ravel() for a in axes], axis=1)
    return torch.from_numpy(points), torch.from_numpy(np.prod([w.ravel() for w in product], axis=0))


def exact_parts(family, network, model, x, nodes=24):
    """The three parts of the bound of one sequence x [L], integrated over t and eps."""
    length, size = len(x), network.size
    eps, weight = grid(length * size)
    batch = family.bound_batch(clean_batch([x] * len(eps)), NoiseKey(0, torch.arange(len(eps))))
    normal = eps.view(-1, length, size).repeat(2, 1, 1)
    times, weights = np.polynomial.legendre.leggauss(nodes)
    total = torch.zeros(3, dtype=torch.float64)
    for t, w in zip((times + 1) / 2, weights / 2, strict=True):
        time = batch.auxiliary["time"].clone()
        time[len(eps) :] = t
        model.gamma = network.schedule(time)[0].detach()
        at = replace(batch, auxiliary={**batch.auxiliary, "normal": normal, "time": time})
        with torch.no_grad():
            total += w * network(model, at, exact=True).view(3, -1) @ weight
    return total


def mixture_kl(network, embeddings, p):
    """KL(q(z_1) || N(0, 1)) for tokens drawn from p, with embeddings [k, D]."""
    level = Level(network.schedule(torch.ones(1, dtype=torch.float64))[0].detach())
    eps, weight = grid(embeddings.shape[1])
    total = 0.0
    for e, probability in zip(embeddings, p, strict=True):
        z = level.alpha * e + level.sigma * eps
        parts = [
            math.log(q) - 0.5 * (z - level.alpha * other).square().sum(1) / level.sigma**2
            for other, q in zip(embeddings, p, strict=True)
        ]
        log_q = torch.stack(parts).logsumexp(0) - embeddings.shape[1] * level.sigma.log()
        total += probability * float(weight @ (log_q + 0.5 * z.square().sum(1)))
    return total


def test_the_bound_of_the_exact_posterior_is_the_entropy_and_the_priors_gap(topology):
    """Whatever the schedule is between its end points; and any other answer is worse."""
    ends = {"end_points": (-2.5, 2.0)}
    answer = torch.from_numpy(SKEW).log()
    family, network, model = language(topology, CIRCLE, lambda z, level: answer, **ends)
    parts = sum(q * exact_parts(family, network, model, [v]) for v, q in enumerate(SKEW))
    gap = mixture_kl(network, torch.from_numpy(CIRCLE), SKEW)
    want = -float((SKEW * np.log(SKEW)).sum()) + gap
    assert gap > 0.005 and (parts > 0.01).all()
    assert float(parts.sum()) == pytest.approx(want, abs=1e-4)
    uniform = language(topology, CIRCLE, lambda z, level: 0.0 * answer, **ends)
    worse = sum(q * exact_parts(*uniform, [v]) for v, q in enumerate(SKEW))
    assert float(worse.sum()) > want + 0.1


def test_a_model_that_knows_nothing_has_the_bound_ln_k_for_every_token(topology):
    """On a circle all tokens are alike, so that each one's bound is ln K and the prior's gap."""
    family, network, model = language(
        topology, CIRCLE, lambda z, level: torch.zeros(5), end_points=(-2.5, 2.0)
    )
    gap = mixture_kl(network, torch.from_numpy(CIRCLE), np.full(5, 0.2))
    for v in (0, 2, 3):
        bound = float(exact_parts(family, network, model, [v]).sum())
        assert bound == pytest.approx(math.log(5) + gap, abs=1e-4)


def test_two_tokens_that_depend_on_each_other_are_scored_jointly(topology):
    """The transformer's share is p(x^l | z of the others); together they give H(x^1, x^2)."""
    joint = torch.tensor([[0.5, 0.1], [0.05, 0.35]], dtype=torch.float64)
    signs = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)

    def answer(z, level):
        likelihood = (level.sharpness * z * signs[:, 0]).exp()  # [b, 2, 2]
        first, second = likelihood[:, 1] @ joint.t(), likelihood[:, 0] @ joint
        return torch.stack((first, second), dim=1).log()

    family, network, model = language(topology, signs, answer, end_points=(-2.0, 1.5))
    pairs = [(a, b) for a in range(2) for b in range(2)]
    p = np.array([float(joint[a, b]) for a, b in pairs])
    total = sum(
        q * float(exact_parts(family, network, model, pair).sum())
        for pair, q in zip(pairs, p, strict=True)
    )
    both = torch.stack([torch.cat((signs[a], signs[b])) for a, b in pairs])
    want = -float((p * np.log(p)).sum()) + mixture_kl(network, both, p)
    assert total == pytest.approx(want, abs=1e-4)


def schedule(seed=0, end_points=(-3.0, 6.0)):
    made = LearnedSchedule(end_points)
    g = torch.Generator().manual_seed(seed)
    for name, p in made.named_parameters():
        if name != "end_points":
            p.data.normal_(generator=g)
    return made.double()


def test_the_schedule_rises_between_exact_end_points_with_the_stated_slope():
    made = schedule()
    t = torch.linspace(0, 1, 101, dtype=torch.float64).requires_grad_()
    gamma, speed, last = made(t)
    assert (gamma.diff() > 0).all() and (last == 6).all()
    torch.testing.assert_close(
        gamma[[0, -1]], torch.tensor([-3.0, 6.0]).double(), rtol=1e-12, atol=0
    )
    (slope,) = torch.autograd.grad(gamma.sum(), t)
    torch.testing.assert_close(speed, slope, rtol=1e-10, atol=1e-10)
    level = Level(gamma)
    torch.testing.assert_close(level.alpha**2 + level.sigma**2, torch.ones_like(t))
    torch.testing.assert_close(torch.log(level.sigma**2 / level.alpha**2), gamma)


def test_the_diffusion_weight_integrates_to_half_the_change_of_snr_for_any_schedule():
    nodes, weights = np.polynomial.legendre.leggauss(200)
    t = torch.from_numpy((nodes + 1) / 2)
    want = 0.5 * (math.exp(3) - math.exp(-6))
    for seed in range(3):
        gamma, speed, _ = schedule(seed)(t)
        total = float((0.5 * torch.exp(-gamma) * speed).detach() @ torch.from_numpy(weights / 2))
        assert total == pytest.approx(want, rel=1e-9)


def test_prior_kl_is_the_formula_for_normals_and_tiny_at_the_noisy_end():
    e = torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64)
    for gamma in (-3.0, 0.0, 6.0, 15.0):
        level = Level(torch.tensor(gamma, dtype=torch.float64))
        want = torch.distributions.kl_divergence(
            torch.distributions.Normal(level.alpha * e, level.sigma),
            torch.distributions.Normal(torch.zeros_like(e), 1.0),
        ).sum()
        got = level.prior_kl(e.square().sum(), 3)
        assert float(got) == pytest.approx(float(want), rel=1e-6)
    assert 0 < float(Level(torch.tensor(6.0).double()).prior_kl(e.square().sum(), 3)) < 6e-4


def test_the_output_prior_is_bayes_rule_for_the_tokens_own_point(topology):
    from pretrain.model.embedding_diffusion import mean_embedding
    from pretrain.model.vocab import VocabChunk

    g = torch.Generator().manual_seed(0)
    e = torch.nn.functional.normalize(torch.randn(7, 4, generator=g).double(), dim=1)
    z, known = torch.randn(3, 4, generator=g).double(), torch.randn(3, 7, generator=g).double()
    level = Level(torch.tensor(0.7).double())
    likelihood = -0.5 * (z[:, None] - level.alpha * e).square().sum(-1) / level.sigma**2
    p = (known + likelihood).softmax(-1)
    ids = torch.tensor([0, 3, 6])
    model = SimpleNamespace(
        score=lambda rows, score: score(
            lambda r, w: VocabChunk(r, topology), rows, torch.empty(7, 1)
        )
    )
    every = torch.ones(3, dtype=torch.bool)
    log_p, mean = mean_embedding(model, known, level.sharpness * z, e, ids, every)
    torch.testing.assert_close(log_p, p.gather(1, ids[:, None])[:, 0].log())
    torch.testing.assert_close(mean, p @ e)


def test_probability_and_mean_have_the_gradients_of_autograd(topology, monkeypatch):
    """Slice by slice, excluded columns at probability zero, the table fed by chosen rows only."""
    from pretrain.model import vocab_functions
    from pretrain.model.vocab_expectation import VocabularyMean

    monkeypatch.setattr(vocab_functions, "_SLICE_ON_CPU", 3 * 9)
    g = torch.Generator().manual_seed(1)
    logits, query = torch.randn(8, 9, generator=g).double(), torch.randn(8, 4, generator=g).double()
    table, targets = torch.randn(9, 4, generator=g).double(), torch.randint(2, 9, (8,), generator=g)
    logits[:, :2] = -torch.inf
    learns = torch.tensor([True, False] * 4)
    c, w = torch.randn(8, generator=g).double(), torch.randn(8, 4, generator=g).double()
    results = []
    for ours in (True, False):
        leaves = [x.clone().requires_grad_() for x in (logits, query, table)]
        if ours:
            log_p, mean = VocabularyMean.apply(*leaves, targets, learns, 0, topology.tp_group)
        else:
            each = torch.where(learns[:, None, None], leaves[2], leaves[2].detach())  # [8, 9, 4]
            f = leaves[0] + (leaves[1][:, None] * each).sum(-1)
            log_p = f.log_softmax(-1).gather(1, targets[:, None])[:, 0]
            mean = (f.softmax(-1)[..., None] * each).sum(1)
        ((c * log_p).sum() + (w * mean).sum()).backward()
        results.append((log_p.detach(), mean.detach(), *(leaf.grad for leaf in leaves)))
    for mine, reference in zip(*results, strict=True):
        torch.testing.assert_close(mine, reference)
    assert (results[0][2][:, :2] == 0).all()


def test_operations_are_those_that_the_paper_counts():
    """Plaid 1B: (72 L d^2) (1 + .25 / 3) for the layers of 24 x 2048 (they write 0.33)."""
    from pretrain.study.flops import train_flops_per_token

    model = ModelConfig(
        num_layers=24, hidden_size=2048, num_attention_heads=32,
        ffn_hidden_size=8192, activation="gelu",
    )  # fmt: skip
    got = train_flops_per_token(model, 32768, 1024, causal=False, head_share=0.0, extra_passes=0.25)
    attention = 12 * 24 * 1024 * 2048
    want = (72 * 24 * 2048**2 + attention) * (1 + 0.25 / 3)
    assert got == pytest.approx(want, rel=1e-12)


def test_auxiliary_parameters_are_counted_as_built(topology):
    module = real_module(topology)
    built = sum(p.numel() for p in module.own.parameters())
    assert module.objective.auxiliary_parameters(module.model.config, 8) == built


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parallel": {"pipeline_parallel_size": 2}}, "pipeline_parallel_size at most 1, not 2"),
        ({"parallel": {"context_parallel_size": 2}}, "context_parallel_size at most 1, not 2"),
        ({"model": {"tie_embeddings": False}}, "set it to true"),
        ({"train": {"loss_chunk": 64}}, "null or 0, not 64"),
        ({"objective": {"end_points": (2.0, -1.0)}}, "low < high"),
    ],
)
def test_what_cannot_work_is_refused_with_what_can(changes, message):
    values = {"data": {"train": "a", "validation": "b", "tokenizer": "c"}} | changes
    values["objective"] = {"name": "gaussian"} | changes.get("objective", {})
    with pytest.raises(ValueError, match=message):
        Config(**values)


def test_surrogates_and_foreign_settings_are_refused():
    for fields, message in (({"loss": "simple"}, "elbo"), ({"block_size": 4}, "block_size")):
        with pytest.raises(ValueError, match=message):
            objectives.make("gaussian", **fields)
