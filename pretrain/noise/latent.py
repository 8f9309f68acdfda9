"""Softened tokens: softmax(w / tau) of w = a x + s eps, without drawing K normals (Duo++).

The k largest of the K - 1 entries that are noise only come from the law of order statistics
(arXiv 2602.21185, section 4). Their ids are a random ordered choice among the other tokens, and the
entry of the token itself is one more normal. The k largest entries, their ids and the argmax are
exact in law. The denominator of the softmax is the sum of the drawn entries and the expected sum of
the K - 1 - k entries below them; it is exact for k = K - 1 and as tau goes to 0. Weights are not
renormalised.

The argmax is that of all entries. (The reference code counts a token as clean whenever it is among
the k largest, which at half noise is a share of .31 instead of .24.)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pretrain.noise.key import NoiseKey


@dataclass(frozen=True)
class SoftTokens:
    """Embedding of a softened token: sum over k of mix * E[ids]."""

    ids: Tensor
    """int64 [b, s, k], the largest entry first: slot 0 is the argmax."""
    mix: Tensor
    """Softmax weights, float64 [b, s, k]; their sum is below 1 by the share of the other tokens."""


def soft_tokens(
    x0: Tensor, allowed: Tensor, mu: Tensor, tau: Tensor, k: int, noise: NoiseKey
) -> SoftTokens:
    """Soften x0 int64 [b, s] at mu = a / s and temperature tau, float64 [b, 1].

    `allowed` holds the K ids in ascending order; an id outside them stands for its successor.
    """
    others = len(allowed) - 1
    assert 1 <= k <= others, "at most all other ids can be mixed in"
    spread = torch.rsqrt(1.0 + mu.square()) / tau  # of w / tau
    epsilon = largest_normals(others, k, x0.shape[1], noise)
    # Entry of the token itself [b, s], after the k largest of the others [b, s, k + 1].
    itself = mu + torch.special.ndtri(noise.fine_uniform("latent/own", x0.shape[1]))
    values = torch.cat((epsilon, itself[..., None]), dim=-1) * spread[..., None]
    token = torch.searchsorted(allowed, x0).clamp(max=others)
    index = _distinct(others, k, x0.shape[1], noise)
    index += index >= token[..., None]  # numbers among all K, the token itself left out
    ids = allowed[torch.cat((index, token[..., None]), dim=-1)]
    rest = _rest(values[..., k - 1], spread, others - k)
    log_total = torch.logaddexp(values.logsumexp(dim=-1), rest)
    kept, slot = values.topk(k, dim=-1)
    return SoftTokens(ids.gather(-1, slot), (kept - log_total[..., None]).exp())


def largest_normals(count: int, k: int, length: int, noise: NoiseKey) -> Tensor:
    """Draw the k largest of `count` standard normals, descending, float64 [b, length, k].

    The largest of n uniforms is U^(1/n), and the others are n - 1 uniforms below it. They become
    normals by 1 - u, because u itself is close to 1.
    """
    log_u = torch.stack(
        [noise.fine_uniform("latent/order", length, draw=j).log() / (count - j) for j in range(k)],
        dim=-1,
    ).cumsum(dim=-1)
    return -torch.special.ndtri(-torch.expm1(log_u))


def _distinct(count: int, k: int, length: int, noise: NoiseKey) -> Tensor:
    """Draw k distinct numbers below `count` in random order, int64 [b, length, k]."""
    chosen: list[Tensor] = []
    for j in range(k):
        left = (noise.uniform("latent/id", length, draw=j) * (count - j)).long()
        if chosen:  # the left-th of those not chosen yet
            for earlier in torch.stack(chosen).sort(dim=0).values:
                left = left + (left >= earlier)
        chosen.append(left)
    return torch.stack(chosen, dim=-1)


def _rest(smallest: Tensor, spread: Tensor, count: int) -> Tensor:
    """Log of the expected sum of e^w over `count` normals of deviation `spread` below `smallest`.

    E[e^w | w < c] = e^(s^2 / 2) Phi((c - s^2) / s) / Phi(c / s), computed in logarithms.
    """
    if count == 0:
        return torch.full_like(smallest, -torch.inf)
    log_ndtr = torch.special.log_ndtr
    mean = 0.5 * spread.square() + log_ndtr(smallest / spread - spread) - log_ndtr(
        smallest / spread
    )  # fmt: skip
    return mean + torch.log(torch.tensor(float(count), dtype=torch.float64))
