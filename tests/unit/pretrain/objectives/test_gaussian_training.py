"""Training of Gaussian diffusion: its learned schedule, its shares, and conditioning on itself."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch
from points import CIRCLE, SKEW, clean_batch, language, real_module, space

from pretrain.config.objectives import objectives
from pretrain.noise.key import NoiseKey
from pretrain.noise.learned import Level
from pretrain.objectives import build_objective


def training_batch(family, n=16, length=3):
    x = torch.randint(0, 5, (n, length), generator=torch.Generator().manual_seed(0))
    clean = clean_batch(x)
    return family.corrupt(clean, NoiseKey(1, clean.position))


def test_between_its_end_points_the_schedule_follows_the_variance_of_the_bound(topology):
    """Gradient of g: that of sum_i L_i dL_i 2; end points and embeddings: that of the loss."""
    answer = torch.from_numpy(SKEW).log()
    family, network, model = language(topology, CIRCLE, lambda z, level: answer)
    batch = training_batch(family)
    model.gamma = network.schedule(batch.auxiliary["time"])[0].detach()
    names = ("height", "steepness", "offset", "end_points")

    def gradients(terms):
        network.zero_grad()
        network(model, replace(batch, auxiliary={**batch.auxiliary, "terms": terms})).backward()
        return [getattr(network.schedule, name).grad.clone() for name in names]

    got = gradients(batch.auxiliary["terms"])
    original = network.schedule.forward
    network.schedule.forward = lambda t, factor: original(t)  # the plain gradient from here on
    plain = gradients(batch.auxiliary["terms"])
    want = [torch.zeros_like(p) for p in plain[:3]]
    for i in range(16):
        terms = torch.zeros_like(batch.auxiliary["terms"])
        terms[i, 1] = 1.0
        with torch.no_grad():
            loss = (
                network(model, replace(batch, auxiliary={**batch.auxiliary, "terms": terms})) / 3.0
            )
        weight = float(batch.auxiliary["terms"][i, 1])
        for total, part in zip(want, gradients(terms)[:3], strict=True):
            total += 2.0 * float(loss) * weight * part
    for a, b in zip(got, [*want, plain[3]], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)
        assert float(a.abs().max()) > 1e-4


def test_learning_the_schedule_lowers_the_variance_and_keeps_the_mean(topology):
    answer = torch.from_numpy(SKEW).log()
    family, network, model = language(
        topology, CIRCLE, lambda z, level: answer, end_points=(-3.0, 3.0)
    )
    shape = [network.schedule.steepness, network.schedule.offset, network.schedule.height]
    optimizer = torch.optim.Adam(shape, lr=0.05)

    def step(number):
        """Mean and variance of the diffusion term of 64 tokens; one update unless number < 0."""
        x = torch.multinomial(
            torch.from_numpy(SKEW), 64, True, generator=torch.Generator().manual_seed(7)
        )
        clean = clean_batch(x[:, None], torch.arange(64) + 64 * abs(number))
        batch = family.corrupt(clean, NoiseKey(5, clean.position))
        terms = torch.zeros_like(batch.auxiliary["terms"])
        terms[:, 1] = 1.0
        model.gamma = network.schedule(batch.auxiliary["time"])[0].detach()
        if number >= 0:
            optimizer.zero_grad()
            network(model, replace(batch, auxiliary={**batch.auxiliary, "terms": terms})).backward()
            optimizer.step()
            return None
        gamma, speed, _ = network.schedule(batch.auxiliary["time"])
        level = Level(gamma[:, None])
        e = network.embedding(batch.ids)[0][:, 0]
        z = level.alpha * e + level.sigma * batch.auxiliary["normal"][:, 0]
        p = (answer + level.sharpness * z @ torch.from_numpy(CIRCLE).t()).softmax(-1)
        error = (e - p @ torch.from_numpy(CIRCLE)).square().sum(-1)
        return (0.5 * torch.exp(-gamma) * speed * error)[batch.auxiliary["time"] > 0].detach()

    before = torch.cat([step(-i) for i in range(1, 41)])
    for number in range(60):
        step(number)
    after = torch.cat([step(-i) for i in range(1, 41)])
    assert float(after.var()) < 0.8 * float(before.var())
    error = math.sqrt((float(before.var()) + float(after.var())) / len(after))
    assert abs(float(after.mean() - before.mean())) < 4 * error


def test_shares_of_a_window_are_exact_and_weights_undo_them():
    family = build_objective(objectives.make(name="gaussian", time_window=64), space(5))
    batch = training_batch(family, n=64)
    terms, conditioned = batch.auxiliary["terms"], batch.auxiliary["conditioned"]
    torch.testing.assert_close(terms.mean(dim=0), torch.ones(3, dtype=torch.float64))
    at_zero = terms[:, 0] > 0
    assert at_zero.sum() == 8 and (batch.auxiliary["time"][at_zero] == 0).all()
    assert conditioned.sum() == 16
    rest = batch.auxiliary["time"][~at_zero].sort().values
    assert ((rest * 56).long() == torch.arange(56)).all()  # one in each stratum


def test_noise_belongs_to_the_position_and_not_to_the_batch():
    family = build_objective(objectives.make(name="gaussian", time_window=8), space(5))
    x = torch.randint(0, 5, (24, 7), generator=torch.Generator().manual_seed(0))
    for make in (family.corrupt, family.bound_batch):
        whole = make(clean_batch(x), NoiseKey(4, torch.arange(24)))
        copies = len(whole.ids) // 24
        for size in (1, 5):
            for a in range(0, 24, size):
                position = torch.arange(a, min(24, a + size))
                part = make(clean_batch(x[position], position), NoiseKey(4, position))
                rows = torch.cat([position + 24 * i for i in range(copies)])
                for name in ("normal", "time", "terms", "conditioned"):
                    assert torch.equal(part.auxiliary[name], whole.auxiliary[name][rows]), name


def test_a_sequence_conditioned_on_itself_is_given_the_first_pass_and_moves_no_noise(topology):
    module = real_module(topology)
    batch = training_batch(module.objective)

    def loss_of(rows, first_pass):
        """Loss with these rows conditioned; `first_pass` replaces what the first pass gives."""
        auxiliary = {
            **batch.auxiliary,
            "conditioned": rows,
            "first_pass": torch.arange(16),
            "first_rule": batch.attention,
        }
        kept = module.own._first_pass
        if first_pass is not None:
            module.own._first_pass = lambda *arguments: first_pass
        module.zero_grad()
        loss = module(replace(batch, auxiliary=auxiliary))
        loss.backward()
        module.own._first_pass = kept
        return loss.detach()

    every, none = torch.ones(16, dtype=torch.bool), torch.zeros(16, dtype=torch.bool)
    blank = torch.zeros(16, 3, 16, dtype=torch.float64)
    auxiliary = {
        **batch.auxiliary,
        "conditioned": every,
        "first_pass": torch.arange(16),
        "first_rule": batch.attention,
    }
    rows, table = module.own.embedding(batch.ids)
    gamma = module.own.schedule(auxiliary["time"])[0]
    level = Level(gamma[:, None, None])
    z = level.alpha * rows + level.sigma * auxiliary["normal"]
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
