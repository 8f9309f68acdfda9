"""Interval of noise levels under which block diffusion trains with the least variance.

BD3-LM (arXiv 2503.09573) trains on t ~ U[low, high]. At every evaluation it moves to the interval
under which the loss of a block varies least. Here one pass over blocks with t ~ U(0, 1) measures
all intervals at once: the blocks whose t falls into an interval are a sample of that interval. Sums
add up over ranks, and the choice is a function of the sums, so that all ranks agree.

The published code also draws the masks of a block again until the share that is masked lies in the
interval. The number of masks then follows a truncated binomial distribution, from which it is drawn
directly here. A measured block, whose masks were drawn once, gets the importance weight
1 / P(allowed) where its number of masks is allowed, and 0 elsewhere.
"""

from __future__ import annotations

import torch
from torch import Tensor

Interval = tuple[float, float]


def candidate_intervals() -> list[Interval]:
    """Intervals of widths 0.5 to 0.9 that begin on a grid of 0.05, and all of (0, 1)."""
    steps = [
        (low / 20, (low + width) / 20)
        for width in (10, 12, 14, 16, 18)
        for low in range(20 - width + 1)
    ]
    return [*steps, (0.0, 1.0)]


def interval_sums(t: Tensor, loss: Tensor, weight: Tensor | None = None) -> Tensor:
    """Count, sum and sum of squares of `loss` [m] inside each interval, float64 [intervals, 3].

    t [m] are the levels of the blocks, uniform on (0, 1); `weight` [intervals, m] are the
    importance weights of the blocks.
    """
    low, high = torch.tensor(candidate_intervals(), dtype=torch.float64).T
    inside = ((t[None] >= low[:, None]) & (t[None] <= high[:, None])).double()
    inside = inside if weight is None else inside * weight
    loss = loss.double()
    return torch.stack((inside.sum(dim=1), inside @ loss, inside @ loss.square()), dim=1)


def best_interval(sums: Tensor) -> Interval:
    """Interval of least variance; the widest one among ties."""
    count, total, squares = sums.T
    assert bool((count > 1).all()), "every interval needs at least two blocks"
    variance = (squares - total.square() / count) / (count - 1.0)
    intervals = candidate_intervals()
    width = torch.tensor([high - low for low, high in intervals])
    best = variance == variance.min()
    return intervals[int(torch.where(best, width, -1.0).argmax())]


def count_distribution(size: Tensor, t: Tensor) -> Tensor:
    """Probabilities of 0, 1, .. N masks among `size` tokens at level t, float64 [..., N + 1].

    size and t are float64 of one shape; N is the largest size.
    """
    masks = torch.arange(int(size.max()) + 1, dtype=torch.float64)
    rest = size[..., None] - masks
    left, level = rest.clamp(min=0), t[..., None]
    log_binomial = torch.lgamma(masks + left + 1) - torch.lgamma(masks + 1) - torch.lgamma(left + 1)
    log_p = log_binomial + torch.xlogy(masks, level) + torch.special.xlog1py(left, -level)
    return torch.where(rest >= 0, log_p.exp(), 0.0)


def allowed_counts(size: Tensor, interval: Interval) -> Tensor:
    """True for the numbers 0, 1, .. N of masks whose share of `size` is in the interval.

    bool [..., N + 1]. Where no number qualifies (a short block at the end of a sequence), all do.
    """
    masks, n = torch.arange(int(size.max()) + 1), size[..., None]
    low, high = interval
    # A bound that is a whole number of tokens, as .35 of 20, is inside whatever its rounding.
    inside = (masks >= low * n - 1e-9) & (masks <= high * n + 1e-9) & (masks <= n)
    return torch.where(inside.any(dim=-1, keepdim=True), inside, masks <= n)


def draw_counts(size: Tensor, t: Tensor, interval: Interval, u: Tensor) -> Tensor:
    """Draw numbers of masks by the uniforms u: binomial, given that the share is allowed.

    All arguments and the result are float64 of one shape.
    """
    # Inverse of the cumulative distribution, which is not normalised: u is scaled instead.
    mass = (count_distribution(size, t) * allowed_counts(size, interval)).cumsum(dim=-1)
    return (mass <= u[..., None] * mass[..., -1:]).sum(dim=-1).double()


def count_weights(size: Tensor, t: Tensor, number: Tensor) -> Tensor:
    """Importance weights [intervals, m] of blocks [m] that have `number` masks.

    They turn blocks whose masks were drawn once into a sample of those drawn until allowed.
    """
    probability, drawn = count_distribution(size, t), number.long()[:, None]
    smallest = torch.finfo(probability.dtype).tiny
    weights = []
    for interval in candidate_intervals():
        allowed = allowed_counts(size, interval)
        chance = (probability * allowed).sum(dim=-1)
        weights.append(allowed.gather(1, drawn)[:, 0] / chance.clamp(min=smallest))
    return torch.stack(weights)
