"""Ancestral sampling of Gaussian diffusion on the grid t = 1, 1 - 1/T, ..., 0.

    z_s ~ N((1 - c) alpha_s / alpha_t z_t + c alpha_s m,  c sigma_s^2)
    c = 1 - exp(gamma_s - gamma_t)

This is the posterior of z_s given z_t and E[x] = m (Plaid, arXiv 2305.18619). The estimate m of a
pass is an input of the next one (self-conditioning). The last pass, at t = 0, draws tokens from
p(x | z_0).

A prompt conditions by token guidance, m + sigma^2 / alpha d/dz sum_l log p(x^l | z) over its
tokens. For a single token that is E[E[x] | z, x^l] exactly; several are taken as independent given
z. At the positions of the prompt m is its embedding, so that z is noised there as in training.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pretrain.batch import AttentionRule
from pretrain.noise.key import NoiseKey
from pretrain.noise.learned import Level
from pretrain.sampling.draw import gumbel_argmax, sharpen

if TYPE_CHECKING:
    from pretrain.model.embedding_diffusion import EmbeddingDiffusion
    from pretrain.model.transformer import Transformer


def reverse(z: Tensor, mean: Tensor, gamma_t: Tensor, gamma_s: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of q(z_s | z_t, E[x] = mean); all float64, gammas broadcast."""
    t, s = Level(gamma_t), Level(gamma_s)
    c = -torch.expm1(gamma_s - gamma_t)
    return z * (1.0 - c) * s.alpha / t.alpha + c * s.alpha * mean, c.sqrt() * s.sigma


@torch.no_grad()
def sample_gaussian(
    model: Transformer,
    network: EmbeddingDiffusion,
    prompt: Tensor,
    noise: NoiseKey,
    *,
    length: int,
    steps: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    self_conditioning: bool = True,
) -> tuple[Tensor, int]:
    """Draw `length` tokens of which the first are `prompt` int64 [b, p] (p may be 0).

    Temperature and nucleus act on the distribution of each token, in every pass. Without
    `self_conditioning` the estimate of a pass is no input of the next one. Returns tokens int64
    [b, length] and forward passes.
    """
    b, given = prompt.shape
    rows, table = network.embedding(prompt)
    grid = torch.linspace(1.0, 0.0, steps + 1, dtype=torch.float64, device=prompt.device)
    gamma, _, _ = network.schedule(grid)
    z = noise.normal("prior", length * network.size).view(b, length, network.size)
    first = Level(gamma[0])
    z[:, :given] = first.alpha * rows + first.sigma * z[:, :given]
    previous = torch.zeros_like(z)
    for step in range(steps):
        logits, guidance = _predict(model, network, z, gamma[step], previous, table, prompt)
        mean = torch.empty_like(z)
        for row in range(b):  # one row at a time: float64 over the vocabulary is large
            mean[row] = sharpen(logits[row], temperature, top_p).softmax(dim=-1) @ table
        previous = mean if self_conditioning else previous
        mean = mean + guidance
        mean[:, :given] = rows
        center, spread = reverse(z, mean, gamma[step], gamma[step + 1])
        eta = noise.normal("step", length * network.size, draw=step)
        z = center + spread * eta.view_as(z)
    logits, _ = _predict(model, network, z, gamma[steps], previous, table, prompt[:, :0])
    ids = torch.empty(b, length, dtype=torch.int64, device=prompt.device)
    ids[:, :given] = prompt
    for place in range(given, length):
        # Keyed by row and position: every position has a separate stream of uniforms.
        site = noise.at(noise.position * length + place)
        scores = sharpen(logits[:, place], temperature, top_p)
        ids[:, place] = gumbel_argmax(scores, site.fine_uniform("sample", scores.shape[-1]))
    return ids, steps + 1


def _predict(
    model: Transformer,
    network: EmbeddingDiffusion,
    z: Tensor,
    gamma: Tensor,
    previous: Tensor,
    table: Tensor,
    prompt: Tensor,
) -> tuple[Tensor, Tensor]:
    """Logits [b, length, v] with the output prior, and the guidance of the prompt [b, length, d].

    Logits have the precision of the network. The guidance is added to the mean embeddings.
    """
    b, length, _ = z.shape
    ids = torch.zeros(b, length, dtype=torch.int64, device=z.device)
    positions = torch.arange(length, device=z.device)[None]
    rule, given = AttentionRule("bidirectional"), prompt.shape[1]
    with torch.set_grad_enabled(given > 0):
        z = z.detach().requires_grad_(given > 0)
        rows, query = network.ask(model, ids, positions, rule, z, gamma.expand(b), previous)
        logits = model.vocabulary(rows).logits
        prior = query.to(logits.dtype) @ table.to(logits.dtype).t()
        logits = (logits + prior).view(b, length, -1)
        if not given:
            return logits, torch.zeros_like(z)
        known = logits[:, :given].log_softmax(dim=-1).gather(2, prompt[..., None])
        (gradient,) = torch.autograd.grad(known.sum(), z)
    return logits.detach(), gradient / Level(gamma).sharpness
