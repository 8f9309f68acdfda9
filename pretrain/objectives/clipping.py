"""Which interval of noise levels trains block diffusion with the least variance.

BD3-LM (arXiv 2503.09573) trains on t ~ U[low, high] and, at every evaluation, moves to the
interval under which the loss of a block varies least. Here one pass over blocks with t ~ U(0, 1)
measures all intervals at once, because those of its blocks that fall into an interval are a sample
of it. Sums add over ranks; the choice is a function of the sums, so that all ranks agree.
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


def interval_sums(t: Tensor, loss: Tensor) -> Tensor:
    """Count, sum and sum of squares of `loss` [m] inside each interval, float64 [intervals, 3].

    t [m] are the levels of the blocks, uniform on (0, 1).
    """
    low, high = torch.tensor(candidate_intervals(), dtype=torch.float64).T
    inside = ((t[None] >= low[:, None]) & (t[None] <= high[:, None])).double()
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
