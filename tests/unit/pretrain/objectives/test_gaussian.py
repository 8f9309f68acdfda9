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
from torch import nn

from pretrain.batch import CleanBatch
from pretrain.config import Config, ModelConfig, ObjectiveConfig
from pretrain.errors import ConfigError
from pretrain.noise.key import NoiseKey
from pretrain.noise.learned import LearnedSchedule, Level
from pretrain.objectives import build_objective
from pretrain.vocabulary import TokenSpace

FIRST = 2


def space(k: int) -> TokenSpace:
    """k possible targets with ids 2, 3, ... (the first is <doc>), one padding column behind."""
    return TokenSpace(FIRST + k, FIRST + k + 1, 0, 1, FIRST, (0, 1))


def clean_batch(x, position=None, valid=None) -> CleanBatch:
    tokens = torch.as_tensor(x, dtype=torch.int64) + FIRST
    valid = torch.ones_like(tokens, dtype=torch.bool) if valid is None else valid
    return CleanBatch(
        tokens=torch.where(valid, tokens, 0),
        position=torch.arange(len(tokens)) if position is None else position,
        segment=torch.zeros_like(tokens, dtype=torch.int32),
        valid=valid,
        all_valid=bool(valid.all()),
    )


class Answers(nn.Module):
    """In the place of the transformer: `answer(z [b, s, d], level) -> log p [b, s, k]`."""

    sequence_parallel = False

    def __init__(self, topology, k, size, answer):
        from parallel.layers import parallel_config

        super().__init__()
        self.config = SimpleNamespace(hidden_size=size, time_conditioning=False)
        self.space, self.parallel = space(k), parallel_config(topology)
        self.k, self.answer = k, answer
        self.gamma = torch.empty(0)

    def forward(self, ids, positions, rule, carried, dropout_seed=None):
        self.shape = ids.shape
        return carried[0]

    def score(self, rows, score):
        return score(self.outputs, rows, torch.empty(FIRST + self.k + 1, 1))

    def outputs(self, rows, weight):
        from pretrain.model.vocab import VocabChunk

        level = Level(self.gamma[:, None, None])
        scale = (level.alpha.square() / rows.shape[1] + level.sigma.square()).sqrt()
        logits = torch.full((*self.shape, FIRST + self.k + 1), -torch.inf, dtype=torch.float64)
        logits[..., FIRST : FIRST + self.k] = self.answer(rows.view(*self.shape, -1) * scale, level)
        return VocabChunk(logits.flatten(0, 1))


def language(topology, embeddings, answer, **fields):
    """Objective, its own network with these unit embeddings [k, d], and the stand-in model."""
    embeddings = torch.as_tensor(embeddings, dtype=torch.float64)
    k, size = embeddings.shape
    config = ObjectiveConfig(
        name="gaussian", time_window=64, embedding_size=size, **{"self_conditioning": 0.0} | fields
    )
    family = build_objective(config, space(k))
    model = Answers(topology, k, size, answer)
    own = family.own_network(model, seed=3).double()
    with torch.no_grad():
        own.embedding.weight[FIRST : FIRST + k] = 1.7 * embeddings  # rows are normalised
        own.enter.weight.copy_(torch.eye(size))
        for name in ("steepness", "offset", "height"):  # enough of them to bend, few enough to wait
            setattr(own.schedule, name, nn.Parameter(getattr(own.schedule, name)[:8].clone()))
    return family, own, model


def grid(size, n=32):
    """Nodes [n^size, size] and weights of a standard normal."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(n)
    axes = np.meshgrid(*[nodes] * size, indexing="ij")
    product = np.meshgrid(*[weights / weights.sum()] * size, indexing="ij")
    points = np.stack([a.ravel() for a in axes], axis=1)
    return torch.from_numpy(points), torch.from_numpy(np.prod([w.ravel() for w in product], axis=0))


def exact_parts(family, own, model, x, nodes=24):
    """The three parts of the bound of one sequence x [L], integrated over t and eps."""
    length, size = len(x), own.size
    eps, weight = grid(length * size)
    batch = family.bound_batch(clean_batch([x] * len(eps)), NoiseKey(0, torch.arange(len(eps))))
    normal = eps.view(-1, length, size).repeat(2, 1, 1)
    times, weights = np.polynomial.legendre.leggauss(nodes)
    total = torch.zeros(3, dtype=torch.float64)
    for t, w in zip((times + 1) / 2, weights / 2, strict=True):
        time = batch.own["time"].clone()
        time[len(eps) :] = t
        model.gamma = own.schedule(time)[0].detach()
        at = replace(batch, own={**batch.own, "normal": normal, "time": time})
        with torch.no_grad():
            total += w * own(model, at, exact=True).view(3, -1) @ weight
    return total


def mixture_kl(own, embeddings, p):
    """KL(q(z_1) || N(0, 1)) for tokens drawn from p, with embeddings [k, D]."""
    level = Level(own.schedule(torch.ones(1, dtype=torch.float64))[0].detach())
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


CIRCLE = np.stack([(math.cos(a), math.sin(a)) for a in 2 * math.pi * np.arange(5) / 5])
SKEW = np.array([0.45, 0.25, 0.15, 0.1, 0.05])


def test_the_bound_of_the_exact_posterior_is_the_entropy_and_the_priors_gap(topology):
    """Whatever the schedule is between its end points; and any other answer is worse."""
    ends = {"end_points": (-2.5, 2.0)}
    answer = torch.from_numpy(SKEW).log()
    family, own, model = language(topology, CIRCLE, lambda z, level: answer, **ends)
    parts = sum(q * exact_parts(family, own, model, [v]) for v, q in enumerate(SKEW))
    gap = mixture_kl(own, torch.from_numpy(CIRCLE), SKEW)
    want = -float((SKEW * np.log(SKEW)).sum()) + gap
    assert gap > 0.005 and (parts > 0.01).all()
    assert float(parts.sum()) == pytest.approx(want, abs=1e-4)
    uniform = language(topology, CIRCLE, lambda z, level: 0.0 * answer, **ends)
    worse = sum(q * exact_parts(*uniform, [v]) for v, q in enumerate(SKEW))
    assert float(worse.sum()) > want + 0.1


def test_a_model_that_knows_nothing_has_the_bound_ln_k_for_every_token(topology):
    """On a circle all tokens are alike, so that each one's bound is ln K and the prior's gap."""
    family, own, model = language(
        topology, CIRCLE, lambda z, level: torch.zeros(5), end_points=(-2.5, 2.0)
    )
    gap = mixture_kl(own, torch.from_numpy(CIRCLE), np.full(5, 0.2))
    for v in (0, 2, 3):
        bound = float(exact_parts(family, own, model, [v]).sum())
        assert bound == pytest.approx(math.log(5) + gap, abs=1e-4)


def test_two_tokens_that_depend_on_each_other_are_scored_jointly(topology):
    """The transformer's share is p(x^l | z of the others); together they give H(x^1, x^2)."""
    joint = torch.tensor([[0.5, 0.1], [0.05, 0.35]], dtype=torch.float64)
    signs = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)

    def answer(z, level):
        likelihood = (level.sharpness * z * signs[:, 0]).exp()  # [b, 2, 2]
        first, second = likelihood[:, 1] @ joint.t(), likelihood[:, 0] @ joint
        return torch.stack((first, second), dim=1).log()

    family, own, model = language(topology, signs, answer, end_points=(-2.0, 1.5))
    pairs = [(a, b) for a in range(2) for b in range(2)]
    p = np.array([float(joint[a, b]) for a, b in pairs])
    total = sum(
        q * float(exact_parts(family, own, model, pair).sum())
        for pair, q in zip(pairs, p, strict=True)
    )
    both = torch.stack([torch.cat((signs[a], signs[b])) for a, b in pairs])
    want = -float((p * np.log(p)).sum()) + mixture_kl(own, both, p)
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
        score=lambda rows, score: score(lambda r, w: VocabChunk(r), rows, torch.empty(7, 1))
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
            log_p, mean = VocabularyMean.apply(*leaves, targets, learns, 0)
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


def training_batch(family, n=16, length=3):
    x = torch.randint(0, 5, (n, length), generator=torch.Generator().manual_seed(0))
    clean = clean_batch(x)
    return family.corrupt(clean, NoiseKey(1, clean.position))


def test_between_its_end_points_the_schedule_follows_the_variance_of_the_bound(topology):
    """Gradient of g: that of sum_i L_i dL_i 2; end points and embeddings: that of the loss."""
    answer = torch.from_numpy(SKEW).log()
    family, own, model = language(topology, CIRCLE, lambda z, level: answer)
    batch = training_batch(family)
    model.gamma = own.schedule(batch.own["time"])[0].detach()
    names = ("height", "steepness", "offset", "end_points")

    def gradients(terms):
        own.zero_grad()
        own(model, replace(batch, own={**batch.own, "terms": terms})).backward()
        return [getattr(own.schedule, name).grad.clone() for name in names]

    got = gradients(batch.own["terms"])
    original = own.schedule.forward
    own.schedule.forward = lambda t, factor: original(t)  # the plain gradient from here on
    plain = gradients(batch.own["terms"])
    want = [torch.zeros_like(p) for p in plain[:3]]
    for i in range(16):
        terms = torch.zeros_like(batch.own["terms"])
        terms[i, 1] = 1.0
        with torch.no_grad():
            loss = own(model, replace(batch, own={**batch.own, "terms": terms})) / 3.0
        weight = float(batch.own["terms"][i, 1])
        for total, part in zip(want, gradients(terms)[:3], strict=True):
            total += 2.0 * float(loss) * weight * part
    for a, b in zip(got, [*want, plain[3]], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)
        assert float(a.abs().max()) > 1e-4


def test_learning_the_schedule_lowers_the_variance_and_keeps_the_mean(topology):
    answer = torch.from_numpy(SKEW).log()
    family, own, model = language(topology, CIRCLE, lambda z, level: answer, end_points=(-3.0, 3.0))
    shape = [own.schedule.steepness, own.schedule.offset, own.schedule.height]
    optimizer = torch.optim.Adam(shape, lr=0.05)

    def step(number):
        """Mean and variance of the diffusion term of 64 tokens; one update unless number < 0."""
        x = torch.multinomial(
            torch.from_numpy(SKEW), 64, True, generator=torch.Generator().manual_seed(7)
        )
        clean = clean_batch(x[:, None], torch.arange(64) + 64 * abs(number))
        batch = family.corrupt(clean, NoiseKey(5, clean.position))
        terms = torch.zeros_like(batch.own["terms"])
        terms[:, 1] = 1.0
        model.gamma = own.schedule(batch.own["time"])[0].detach()
        if number >= 0:
            optimizer.zero_grad()
            own(model, replace(batch, own={**batch.own, "terms": terms})).backward()
            optimizer.step()
            return None
        gamma, speed, _ = own.schedule(batch.own["time"])
        level = Level(gamma[:, None])
        e = own.embedding(batch.ids)[0][:, 0]
        z = level.alpha * e + level.sigma * batch.own["normal"][:, 0]
        p = (answer + level.sharpness * z @ torch.from_numpy(CIRCLE).t()).softmax(-1)
        error = (e - p @ torch.from_numpy(CIRCLE)).square().sum(-1)
        return (0.5 * torch.exp(-gamma) * speed * error)[batch.own["time"] > 0].detach()

    before = torch.cat([step(-i) for i in range(1, 41)])
    for number in range(60):
        step(number)
    after = torch.cat([step(-i) for i in range(1, 41)])
    assert float(after.var()) < 0.8 * float(before.var())
    error = math.sqrt((float(before.var()) + float(after.var())) / len(after))
    assert abs(float(after.mean() - before.mean())) < 4 * error


def test_shares_of_a_window_are_exact_and_weights_undo_them():
    family = build_objective(ObjectiveConfig(name="gaussian", time_window=64), space(5))
    batch = training_batch(family, n=64)
    terms, own = batch.own["terms"], batch.own["conditioned"]
    torch.testing.assert_close(terms.mean(dim=0), torch.ones(3, dtype=torch.float64))
    at_zero = terms[:, 0] > 0
    assert at_zero.sum() == 8 and (batch.own["time"][at_zero] == 0).all()
    assert own.sum() == 16
    rest = batch.own["time"][~at_zero].sort().values
    assert ((rest * 56).long() == torch.arange(56)).all()  # one in each stratum


def test_noise_belongs_to_the_position_and_not_to_the_batch():
    family = build_objective(ObjectiveConfig(name="gaussian", time_window=8), space(5))
    x = torch.randint(0, 5, (24, 7), generator=torch.Generator().manual_seed(0))
    for make in (family.corrupt, family.bound_batch):
        whole = make(clean_batch(x), NoiseKey(4, torch.arange(24)))
        copies = len(whole.ids) // 24
        for cut in (1, 5):
            for a in range(0, 24, cut):
                position = torch.arange(a, min(24, a + cut))
                part = make(clean_batch(x[position], position), NoiseKey(4, position))
                rows = torch.cat([position + 24 * i for i in range(copies)])
                for name in ("normal", "time", "terms", "conditioned"):
                    assert torch.equal(part.own[name], whole.own[name][rows]), name


def real_module(topology, **fields):
    from parallel.layers import parallel_config
    from pretrain.model.initialize import initialize
    from pretrain.model.module import ObjectiveModule
    from pretrain.model.transformer import Transformer

    shape = ModelConfig(
        num_layers=1, hidden_size=16, num_attention_heads=2, vocab_multiple=8, init_std=0.3
    )
    inner = TokenSpace(7, 8, 0, 1, FIRST, (0, 1))
    model = Transformer(shape, inner, parallel_config(topology))
    initialize(model, seed=1)
    config = ObjectiveConfig(name="gaussian", time_window=8, **fields)
    module = ObjectiveModule(model, build_objective(config, inner), seed=1)
    module.own.remember.weight.data.normal_(generator=torch.Generator().manual_seed(2))
    return module


def test_a_sequence_conditioned_on_itself_is_told_the_first_pass_and_moves_no_noise(topology):
    module = real_module(topology)
    batch = training_batch(module.objective)

    def loss_of(rows, told):
        """Loss with these rows conditioned; `told` replaces what the first pass gives."""
        own = {
            **batch.own,
            "conditioned": rows,
            "first_pass": torch.arange(16),
            "first_rule": batch.attention,
        }
        kept = module.own._first_pass
        if told is not None:
            module.own._first_pass = lambda *arguments: told
        module.zero_grad()
        loss = module(replace(batch, own=own))
        loss.backward()
        module.own._first_pass = kept
        return loss.detach()

    every, none = torch.ones(16, dtype=torch.bool), torch.zeros(16, dtype=torch.bool)
    blank = torch.zeros(16, 3, 16, dtype=torch.float64)
    own = {
        **batch.own,
        "conditioned": every,
        "first_pass": torch.arange(16),
        "first_rule": batch.attention,
    }
    rows, table = module.own.embedding(batch.ids)
    gamma = module.own.schedule(own["time"])[0]
    level = Level(gamma[:, None, None])
    z = level.alpha * rows + level.sigma * own["normal"]
    with torch.no_grad():
        hidden, query = module.own.ask(
            module.model, batch.ids, batch.positions, batch.attention, z, gamma, blank
        )
        f = module.model.vocabulary(hidden).logits.double() + query @ table.t()
        first = (f.softmax(-1) @ table).view(16, 3, 16)
    torch.testing.assert_close(loss_of(every, None), loss_of(every, first), rtol=1e-5, atol=0)
    assert loss_of(none, None) == loss_of(none, blank)
    assert abs(float(loss_of(every, None) / loss_of(none, None)) - 1) > 1e-3
    loss_of(every, None)
    silent = {n for n, p in module.named_parameters() if p.grad is None or not p.grad.any()}
    assert silent == set(module.lr_scales)
    loss_of(none, None)
    silent = {n for n, p in module.named_parameters() if p.grad is None or not p.grad.any()}
    assert silent == {"own.remember.weight"}


def test_the_bound_reads_nothing_at_invalid_positions_and_counts_them_not(topology):
    module = real_module(topology)
    valid = torch.tensor([[True, True, False], [True, True, True], [False, False, False]])
    clean = clean_batch([(0, 1, 2), (1, 1, 1), (0, 0, 0)], torch.tensor([3, 4, 5]), valid)
    batch = module.objective.bound_batch(clean, NoiseKey(1, clean.position))
    with torch.no_grad():
        parts = module(batch, exact=True).view(3, 3)
        assert (parts[:, 2] == 0).all() and (parts[:, :2] > 0).all()
        other = torch.where(valid.repeat(2, 1), batch.ids, 5)
        again = module(replace(batch, ids=other), exact=True).view(3, 3)
    torch.testing.assert_close(again, parts, rtol=1e-6, atol=0)


def test_training_losses_average_to_the_bound(topology):
    """With one pass in both, over 64 windows of noise, within four standard errors."""
    module = real_module(topology, self_conditioning=0.0)
    n = 512
    x = torch.randint(0, 5, (1, 3), generator=torch.Generator().manual_seed(7)).expand(n, 3)
    means, errors = [], []
    with torch.no_grad():
        for make, exact in (
            (module.objective.corrupt, False),
            (module.objective.bound_batch, True),
        ):
            values = []
            for start in range(0, n, 8):
                key = torch.arange(start, start + 8)
                batch = make(clean_batch(x[:8], key), NoiseKey(2, key))
                values.append(float(module(batch, exact=exact).sum()) / 8)
            means.append(np.mean(values))
            errors.append(np.std(values) / math.sqrt(len(values)))
    assert abs(means[0] - means[1]) < 4 * math.hypot(*errors)
    assert max(errors) < 0.1 * means[1]


def test_operations_are_those_that_the_paper_counts():
    """Plaid 1B: (72 L d^2) (1 + .25 / 3) for the layers of 24 x 2048 (they write 0.33)."""
    from pretrain.scaling.flops import train_flops_per_token

    model = ModelConfig(
        num_layers=24, hidden_size=2048, num_attention_heads=32,
        ffn_hidden_size=8192, activation="gelu",
    )  # fmt: skip
    got = train_flops_per_token(model, 32768, 1024, causal=False, head_share=0.0, extra_passes=0.25)
    attention = 12 * 24 * 1024 * 2048
    want = (72 * 24 * 2048**2 + attention) * (1 + 0.25 / 3)
    assert got == pytest.approx(want, rel=1e-12)


def test_own_parameters_are_counted_as_built(topology):
    module = real_module(topology)
    built = sum(p.numel() for p in module.own.parameters())
    assert module.objective.own_parameters(module.model.config, 8) == built


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parallel": {"pipeline_parallel_size": 2}}, "pipeline_parallel_size 1, not 2"),
        ({"parallel": {"context_parallel_size": 2}}, "context_parallel_size 1, not 2"),
        ({"model": {"tie_embeddings": False}}, "set it to true"),
        ({"train": {"loss_chunk": 64}}, "null or 0, not 64"),
        ({"objective": {"end_points": (2.0, -1.0)}}, "must rise"),
    ],
)
def test_what_cannot_work_is_refused_with_what_can(changes, message):
    values = {"data": {"train": "a", "validation": "b", "tokenizer": "c"}} | changes
    values["objective"] = {"name": "gaussian"} | changes.get("objective", {})
    with pytest.raises(ValueError, match=message):
        Config(**values)


def test_surrogates_and_foreign_settings_are_refused():
    for fields, message in (({"loss": "simple"}, "elbo"), ({"block_size": 4}, "block_size")):
        with pytest.raises(ConfigError, match=message):
            build_objective(ObjectiveConfig(name="gaussian", **fields), space(5))
