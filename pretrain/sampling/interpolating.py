"""Ancestral sampling of uniform and interpolating diffusion on the grid t = 1, 1 - 1/T, ..., 0.

Every step draws every position from p(z_s | z_t, x_theta), so that any token may change, also one
that was not <mask>. The last step ends at t = 0 exactly and leaves no noise. Each step costs one
forward pass. Prompt tokens stay clean in all steps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pretrain.batch import AttentionRule
from pretrain.model.transformer import Transformer
from pretrain.noise.key import NoiseKey
from pretrain.noise.process import NoiseProcess
from pretrain.sampling.draw import gumbel_argmax, sharpen

LARGEST_LEVEL = 7.0
"""Largest sigma = -log alpha that the network is conditioned on: at t = 1 it is infinite, and only
one training example in a thousand is above this value."""


@torch.no_grad()
def sample_interpolating(
    model: Transformer,
    process: NoiseProcess,
    prompt: Tensor,
    noise: NoiseKey,
    *,
    length: int,
    steps: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    greedy_tail: bool = False,
) -> tuple[Tensor, int]:
    """Draw `length` tokens of which the first are `prompt` int64 [b, p] (p may be 0).

    Temperature and nucleus act on x_theta. `greedy_tail` takes the mode of p(x | z_t) in the last
    step, as Duo does; the text is more likely and less diverse. Returns tokens int64 [b, length]
    and forward passes.
    """
    b, given = prompt.shape
    device = prompt.device
    positions = torch.arange(length, device=device)[None]
    grid = torch.linspace(1.0, 0.0, steps + 1, dtype=torch.float64, device=device)
    ids = _prior(process, noise, length)
    ids[:, :given] = prompt
    for step in range(steps):
        t, s = grid[step], grid[step + 1]
        level = (-process.masses(t)[0].log()).clamp(max=LARGEST_LEVEL).float().expand(b)
        rule = AttentionRule("bidirectional")
        hidden = model(ids, positions, rule, level).transpose(0, 1)  # [b, length, h]
        for place in range(given, length):
            logits = sharpen(model.vocabulary(hidden[:, place]).logits, temperature, top_p)
            p = process.reverse(logits.softmax(dim=-1), ids[:, place], t.expand(b), s.expand(b))
            # Keyed by row and position: every position has a separate stream of uniforms.
            site = noise.at(noise.position * length + place)
            if greedy_tail and step == steps - 1:
                ids[:, place] = p.argmax(dim=-1)
                continue
            uniform = site.fine_uniform("sample", p.shape[-1], draw=step)
            ids[:, place] = gumbel_argmax(p.log(), uniform)
    return ids, steps


def _prior(process: NoiseProcess, noise: NoiseKey, length: int) -> Tensor:
    """Draw z_1, pure noise, int64 [b, length]."""
    one = torch.ones(1, 1, dtype=torch.float64, device=noise.position.device)
    _, r, m = process.masses(one)
    u = noise.uniform("prior", length)
    index = (noise.uniform("prior", length, draw=1) * process.num_targets).long()
    drawn = process.allowed.to(u.device)[index]
    total = r * process.num_targets + m
    return torch.where(u * total < m, process.space.mask_id, drawn)
