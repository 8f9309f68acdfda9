"""Which interval of noise levels trains block diffusion with the least variance.

BD3-LM (arXiv 2503.09573) trains on t ~ U[low, high] and, at every evaluation, moves to the
interval under which the loss of a block varies least. Here one pass over blocks with t ~ U(0, 1)
measures all intervals at once, because those of its blocks that fall into an interval are a sample
of it. Sums add over ranks; the choice is a function of the sums, so that all ranks agree.

Their code also draws the masks of a block again until the share that is masked lies in the
interval too. The number of masks then follows a binomial law cut off at both ends, from which it
can be drawn at once; a block that was measured stands for 1 / P(not redrawn) of that law.
"""

from __future__ import annotations

import torch
from torch import Tensor

Interval = tuple[float, float]


def candidate_intervals() -> list[Interval]:
    """Widths 0.5 to 0.9 on a grid of 0.05, and all of (0, 1)."""
    steps = [
        (low / 20, (low + width) / 20)
        for width in (10, 12, 14, 16, 18)
        for low in range(20 - width + 1)
    ]
    return [*steps, (0.0, 1.0)]


def interval_sums(t: Tensor, loss: Tensor, weight: Tensor | None = None) -> Tensor:
    """Count, sum and sum of squares of `loss` [m] inside each interval, float64 [intervals, 3].

    t [m] are the levels of the blocks, uniform on (0, 1); `weight` [intervals, m] says how many
    blocks each one stands for.
    """
    low, high = torch.tensor(candidate_intervals(), dtype=torch.float64).T
    inside = ((t[None] >= low[:, None]) & (t[None] <= high[:, None])).double()
    inside = inside if weight is None else inside * weight
    loss = loss.double()
    return torch.stack((inside.sum(dim=1), inside @ loss, inside @ loss.square()), dim=1)


def best_interval(sums: Tensor) -> Interval:
    """The interval of least variance; the widest of those that tie."""
    count, total, squares = sums.T
    assert bool((count > 1).all()), "every interval needs at least two blocks"
    variance = (squares - total.square() / count) / (count - 1.0)
    intervals = candidate_intervals()
    width = torch.tensor([high - low for low, high in intervals])
    best = variance == variance.min()
    return intervals[int(torch.where(best, width, -1.0).argmax())]


def count_law(size: Tensor, t: Tensor) -> Tensor:
    """Probabilities of 0, 1, .. N masks among `size` tokens at level t, float64 [..., N + 1].

    size and t are float64 of one shape; N is the largest size.
    """
    masks = torch.arange(int(size.max()) + 1, dtype=torch.float64)
    rest = size[..., None] - masks
    left, level = rest.clamp(min=0), t[..., None]
    log_ways = torch.lgamma(masks + left + 1) - torch.lgamma(masks + 1) - torch.lgamma(left + 1)
    log_p = log_ways + torch.xlogy(masks, level) + torch.special.xlog1py(left, -level)
    return torch.where(rest >= 0, log_p.exp(), 0.0)


def allowed_counts(size: Tensor, interval: Interval) -> Tensor:
    """Which numbers 0, 1, .. N of masks are a share of `size` in the interval, bool [..., N + 1].

    Where none is (a block cut short by the end of a sequence), all are.
    """
    masks, n = torch.arange(int(size.max()) + 1), size[..., None]
    low, high = interval
    # A bound that is a whole number of tokens, as .35 of 20, is inside whatever its last bit says.
    inside = (masks >= low * n - 1e-9) & (masks <= high * n + 1e-9) & (masks <= n)
    return torch.where(inside.any(dim=-1, keepdim=True), inside, masks <= n)


def draw_counts(size: Tensor, t: Tensor, interval: Interval, u: Tensor) -> Tensor:
    """Numbers of masks, float64 like size, t and u: binomial, given that the share is allowed."""
    mass = (count_law(size, t) * allowed_counts(size, interval)).cumsum(dim=-1)
    return (mass <= u[..., None] * mass[..., -1:]).sum(dim=-1).double()


def count_weights(size: Tensor, t: Tensor, number: Tensor) -> Tensor:
    """How many blocks a block [m] with `number` masks stands for in each interval, [intervals, m].

    Its weight makes blocks whose masks were drawn once a sample of those drawn until allowed.
    """
    law, own = count_law(size, t), number.long()[:, None]
    weights = []
    for interval in candidate_intervals():
        allowed = allowed_counts(size, interval)
        chance = (law * allowed).sum(dim=-1)
        weights.append(allowed.gather(1, own)[:, 0] / chance.clamp(min=torch.finfo(law.dtype).tiny))
    return torch.stack(weights)
