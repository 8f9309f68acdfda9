"""Ancestral sampling of masked diffusion on the grid t = 1, 1 - 1/T, ..., 0.

From t to s = t - 1/T a masked token is revealed with probability (alpha_s - alpha_t)/(1 - alpha_t)
= 1/(T t), and its token is drawn from the network; visible tokens stay (MDLM, arXiv 2406.07524,
eq. 7). The last step reaches alpha = 1, so no clean-up pass is needed. A row that reveals nothing
in a step needs no forward pass, because the network does not depend on t.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pretrain.batch import AttentionRule
from pretrain.model.transformer import Transformer
from pretrain.noise.key import NoiseKey
from pretrain.sampling.draw import gumbel_argmax, sharpen


@torch.no_grad()
def sample_masked(
    model: Transformer,
    prompt: Tensor,
    noise: NoiseKey,
    *,
    length: int,
    steps: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Fill `length` tokens of which the first are `prompt` int64 [b, p] (p may be 0).

    Returns tokens int64 [b, length] and the forward passes spent on each row, int64 [b].
    """
    b, given = prompt.shape
    ids = torch.full((b, length), model.space.mask_id, dtype=torch.int64, device=prompt.device)
    ids[:, :given] = prompt
    positions = torch.arange(length, device=ids.device)[None]
    evaluations = torch.zeros(b, dtype=torch.int64, device=ids.device)
    for step in range(steps):
        # Reveal with probability 1 / (T t), t = (T - step) / T: exactly 1 in the last step.
        reveal = noise.uniform("reveal", length, draw=step) * (steps - step) < 1.0
        rows, columns = (reveal & (ids == model.space.mask_id)).nonzero(as_tuple=True)
        if not len(rows):
            continue
        active = rows.unique()
        evaluations[active] += 1
        hidden = model(ids[active], positions, AttentionRule("bidirectional"))
        chosen = hidden.transpose(0, 1)[torch.searchsorted(active, rows), columns]
        logits = sharpen(model.vocabulary(chosen).logits, temperature, top_p)
        # Keyed by row and column: every masked position has a separate stream of uniforms.
        site = noise.at(noise.position[rows] * length + columns)
        uniform = site.fine_uniform("sample", logits.shape[-1])
        ids[rows, columns] = gumbel_argmax(logits, uniform)
    return ids, evaluations
