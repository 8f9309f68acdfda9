"""Consistency distillation: pairs of the Gaussian path, an exact KL, and what it buys."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import tables
import torch

from pretrain.errors import ConfigError
from pretrain.noise.duality import Duality, GaussianTime, duality_schedule
from pretrain.noise.key import NoiseKey


def family(k, **fields):
    given = {"round_sequences": 64, "first_gap": 0.25, "gap_interval": (0.01, 0.99), **fields}
    return tables.family("distillation", k, **given)


def pair_table(k, alpha_s, alpha_t):
    """p(z_s, z_t | x) as [x, z_s, z_t]: x until one level, one other id after it."""
    out = np.zeros((k, k, k))
    for x, j in itertools.product(range(k), repeat=2):
        out[x, x, x] += alpha_t / k
        out[x, x, j] += (alpha_s - alpha_t) / k
        out[x, j, j] += (1 - alpha_s) / k
    return out


def test_pairs_have_the_joint_law_of_one_gaussian_path():
    """Our draw at two levels against argmax of a x + s eps with one eps, and against a table."""
    k, n, t, s = 4, 100_000, 0.7, 0.4
    interval = (0.01, 0.99)
    schedule = duality_schedule(k, interval)
    time = GaussianTime.between(Duality(k), interval)
    process = family(k, gap_interval=interval).training_process
    clean = tables.clean_batch(np.full((n, 1), 1))
    ends, alphas, gaussian = [], [], []
    eps = torch.randn(n, k, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for level in (s, t):
        moment = torch.full((1, 1), level, dtype=torch.float64)
        z, _ = process.draw(clean.tokens, process.marginal(moment), NoiseKey(1, clean.position))
        ends.append(z[:, 0] - tables.FIRST)
        alphas.append(float(schedule.alpha(moment)))
        w = eps.clone()
        w[:, 1] += float(time.signal(moment))
        gaussian.append(w.argmax(dim=1))
    expected = pair_table(k, *alphas)[1].ravel()
    error = 4 * np.sqrt(expected * (1 - expected) / n)
    for first, second in (ends, gaussian):
        frequency = np.bincount((first * k + second).numpy(), minlength=k * k) / n
        assert (np.abs(frequency - expected) <= error).all()


def test_both_ends_share_their_noise_and_are_given_their_levels():
    distil = family(8, first_gap=0.125)
    clean = tables.clean_batch(np.random.default_rng(0).integers(8, size=(256, 16)))
    batch = distil.corrupt(clean, NoiseKey(1, clean.position))
    earlier, later = batch.teacher["ids"], batch.ids
    wrong = earlier != clean.tokens
    assert wrong.any() and torch.equal(later[wrong], earlier[wrong])  # noise never comes back
    assert ((earlier == clean.tokens) & (later != clean.tokens)).any()
    assert (batch.noise_level > batch.teacher["noise_level"]).all()
    # Even time: alpha at the teacher's level, delta further on, is alpha at the student's.
    time = GaussianTime.between(Duality(8), (0.01, 0.99))
    duality, gap = Duality(8), distil.gap(clean.position)
    levels = (batch.noise_level, batch.teacher["noise_level"])
    alphas = [(-level.double()).exp()[::50] for level in levels]
    for alpha_t, alpha_s, delta in zip(*alphas, gap[::50], strict=True):
        gamma = [-2 * math.log(duality.signal(float(a))) for a in (alpha_t, alpha_s)]
        assert gamma[0] - gamma[1] == pytest.approx(
            float(delta) * (time.stop - time.start), rel=1e-3
        )


def test_the_gap_doubles_every_round_and_the_teacher_is_renewed_once_a_round():
    distil = family(8, round_sequences=64, first_gap=0.25)
    gaps = distil.gap(torch.tensor([0, 63, 64, 127, 128, 640, 10**9]))
    assert gaps.tolist() == [0.25, 0.25, 0.5, 0.5, 1.0, 1.0, 1.0]
    assert [distil.begins_round(p) for p in (0, 32, 64, 96, 128)] == [
        True,
        False,
        True,
        False,
        True,
    ]
    again = family(8)
    again.restore(distil.state)
    assert not again.begins_round(160) and again.begins_round(192)


def test_settings_that_do_not_fit_are_refused():
    from pretrain.config.compose import compose

    with pytest.raises(ValueError, match="no setting 'curriculum_sequences'"):
        family(8, curriculum_sequences=5)
    base = ["objective=distillation", "data.train=a", "data.validation=b", "data.tokenizer=c"]
    for change, match in (
        ("parallel.pipeline_parallel_size=2", "pipeline_parallel_size at most 1"),
        ("parallel.context_parallel_size=2", "context_parallel_size at most 1"),
        ("parallel.zero_stage=3", "zero_stage at most 2"),
        ("objective.round_sequences=0", "round_sequences is 0"),
        ("objective.round_sequences=100", "positive multiple of train.global_batch_size"),
        ("objective.gap_interval=[0.9,0.2]", "low < high"),
    ):
        with pytest.raises(ConfigError, match=match):
            compose([*base, change])


@pytest.mark.parametrize("reverse", [True, False])
def test_divergence_and_its_gradient_equal_autograd(topology, reverse):
    """Over many slices of rows, with excluded columns, in float64."""
    from pretrain.model import vocab_functions
    from pretrain.model.vocab import VocabChunk

    n, v = 23, 60
    generator = torch.Generator().manual_seed(1)
    logits = [3 * torch.randn(n, v, dtype=torch.float64, generator=generator) for _ in range(2)]
    for each in logits:
        each[:, [3, 40]] = -torch.inf
    up = torch.randn(n, dtype=torch.float64, generator=generator)
    exact, taught = logits[0].clone().requires_grad_(), logits[1]
    p, q = exact.softmax(dim=-1), taught.softmax(dim=-1)
    a, b = (p, q) if reverse else (q, p)
    expected = torch.where(a > 0, a * (a.clamp(min=1e-300) / b.clamp(min=1e-300)).log(), 0.0)
    expected = expected.sum(dim=-1)
    (expected * up).sum().backward()
    previous, vocab_functions._SLICE_ON_CPU = vocab_functions._SLICE_ON_CPU, 5 * v
    try:
        mine = logits[0].clone().requires_grad_()
        got = VocabChunk(mine, topology).divergence_from(VocabChunk(taught, topology), reverse)
        (got * up).sum().backward()
    finally:
        vocab_functions._SLICE_ON_CPU = previous
    torch.testing.assert_close(got, expected.detach(), rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(mine.grad, exact.grad, rtol=1e-10, atol=1e-12)
    chunk = VocabChunk(mine.detach(), topology)
    same = chunk.divergence_from(chunk, reverse)
    assert (same == 0).all()


# A language of two dependent symbols, its exact predictions as a table [z, position, symbol].
K, GRID = 3, 16
JOINT = np.array([[0.6, 0.02, 0.01], [0.01, 0.2, 0.02], [0.02, 0.02, 0.1]])
PAIRS = np.array(list(itertools.product(range(K), repeat=2)))


def exact_table(alpha):
    return tables.leave_one_out(JOINT, PAIRS, alpha * np.eye(K) + (1 - alpha) / K)


def joint_of_ends(alpha_s, alpha_t):
    """p(z_s, z_t) over the language, [9, 9]."""
    pair = pair_table(K, alpha_s, alpha_t)
    return np.einsum("xy,xac,ybd->abcd", JOINT, pair, pair).reshape(9, 9)


def best_student(teacher, alpha_s, alpha_t):
    """The minimiser of E KL(student(z_t) || teacher(z_s)): normalised geometric means."""
    weight = joint_of_ends(alpha_s, alpha_t)
    weight = weight / weight.sum(axis=0)
    mean = np.exp(np.einsum("st,slk->tlk", weight, np.log(teacher)))
    return mean / mean.sum(axis=2, keepdims=True)


def distance(process, alphas, model, steps):
    """Total variation between the language and `steps` ancestral steps by a table of each level."""
    law = np.full(9, 1 / 9)
    grid = np.linspace(GRID, 0, steps + 1).round().astype(int)
    for at, to in itertools.pairwise(grid):
        ends = [1 - alphas[at], 1 - alphas[to] if to > 0 else 0.0]
        t, s = (torch.full((9,), float(e), dtype=torch.float64) for e in ends)
        kernels = []
        for l in range(2):
            x_theta = torch.zeros(9, K + tables.FIRST, dtype=torch.float64)
            x_theta[:, tables.FIRST :] = torch.from_numpy(model[at][:, l])
            z = torch.from_numpy(PAIRS[:, l]) + tables.FIRST
            kernels.append(process.reverse(x_theta, z, t, s)[:, tables.FIRST :].numpy())
        law = np.einsum("z,zi,zj->ij", law, *kernels).ravel()
    return abs(law - JOINT.ravel()).sum() / 2


def test_the_exact_student_is_the_minimum_of_the_loss(topology):
    """Gradient of our loss, weighted by the law of pairs, vanishes at the geometric means."""
    from pretrain.model.vocab import VocabChunk

    alpha_s, alpha_t = 0.7, 0.3
    teacher = exact_table(alpha_s)
    weight = torch.from_numpy(joint_of_ends(alpha_s, alpha_t)).reshape(-1)[:, None]
    answers = torch.from_numpy(np.log(teacher)).repeat_interleave(9, dim=0)

    def gradient(table):
        logits = torch.from_numpy(np.log(table)).requires_grad_()
        rows = logits.repeat(9, 1, 1)  # [z_s, z_t] flat
        chunks = (VocabChunk(x.reshape(-1, K), topology) for x in (rows, answers))
        loss = family(K).teacher_loss(*chunks).view(-1, 2)
        (loss * weight).sum().backward()
        return float(logits.grad.abs().max())

    assert gradient(best_student(teacher, alpha_s, alpha_t)) < 1e-12
    assert gradient(exact_table(alpha_t)) > 1e-3


def test_exact_distillation_makes_few_steps_as_good_as_many_were():
    """Five rounds of minimisers, delta 1/16 to 1, from the exact model of the language: one step
    beats the undistilled model's two, and two and four its own; many steps pay for it."""
    process = tables.family("uniform", K).process
    time = torch.linspace(0, 1, GRID + 1, dtype=torch.float64)
    alphas = duality_schedule(K, (0.006, 0.9987)).alpha(time).tolist()
    student = exact = [exact_table(a) for a in alphas]
    for r in range(5):
        gap, teacher = 2**r, student
        student = [
            best_student(teacher[max(i - gap, 0)], alphas[max(i - gap, 0)], alphas[i])
            for i in range(GRID + 1)
        ]
    before = {n: distance(process, alphas, exact, n) for n in (1, 2, 4, 16)}
    after = {n: distance(process, alphas, student, n) for n in (1, 2, 4, 16)}
    assert after[1] < 0.8 * before[2] < before[1]
    assert after[2] < 0.8 * before[2] and after[4] < 0.8 * before[4]
    assert after[16] > before[16]


def test_equal_inputs_to_student_and_teacher_cost_nothing(topology):
    """delta = 0 at the start of a round; after the student has moved it costs something, and the
    teacher has neither moved nor got a gradient."""
    from pretrain.config.run import ModelConfig
    from pretrain.model.initialize import initialize
    from pretrain.model.teacher import Teacher
    from pretrain.model.transformer import Transformer
    from pretrain.module import ObjectiveModule

    distil = family(12)
    shape = ModelConfig(
        num_layers=1, hidden_size=16, num_attention_heads=2, init_std=0.3, time_conditioning=True
    )
    models = [Transformer(shape, distil.space, topology) for _ in range(2)]
    initialize(models[0], seed=1)
    module = ObjectiveModule(models[0], distil)
    module.teacher = Teacher(models[1])
    module.teacher.renew(models[0])
    names = [name for name, _ in module.named_parameters()]
    assert sorted(module.teacher.parameters) == sorted(names)  # and none of the teacher's is there
    clean = tables.clean_batch(np.random.default_rng(0).integers(12, size=(8, 6)))
    batch = distil.corrupt(clean, NoiseKey(1, clean.position))
    own = {"ids": batch.ids, "noise_level": batch.noise_level}
    assert float(module(replace(batch, teacher=own)).detach()) == 0.0
    loss = module(batch)
    assert float(loss.detach()) > 0
    loss.backward()
    module.loss_chunk = 7  # rows at once, of student and teacher alike
    torch.testing.assert_close(module(batch), loss, rtol=1e-5, atol=0)
    before = {n: p.clone() for n, p in module.teacher.parameters.items()}
    with torch.no_grad():
        for p in module.parameters():
            if p.grad is not None:
                p -= 0.1 * p.grad
    assert float(module(replace(batch, teacher=own)).detach()) > 0
    for name, p in module.teacher.parameters.items():
        assert p.grad is None and torch.equal(p, before[name])
    # The bound does not ask the teacher.
    module.teacher = None
    assert torch.isfinite(
        module(distil.bound_batch(clean, NoiseKey(2, clean.position)), exact=True)
    ).all()
