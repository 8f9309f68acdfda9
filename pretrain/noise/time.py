"""Noise levels, stratified over fixed windows of consecutive positions of the run.

Within a window of n positions every stratum [k/n, (k+1)/n) is hit exactly once, in a keyed order
that is new for each window. So no rank, document or batch index is tied to a noise level (cutting a
sorted vector over ranks would do that), and the global batch size may change: n belongs to the run.
"""

from __future__ import annotations

from torch import Tensor

from pretrain.noise.key import NoiseKey


def stratified_time(noise: NoiseKey, window: int, stream: str = "time") -> Tensor:
    """t in (0, 1) for each position of `noise`, float64 [b]; `window` is n.

    t_g = (perm_w(g mod n) + u_g) / n with w = g // n (variance reduction of MDLM, arXiv 2406.07524,
    made independent of the layout). Where `noise` names a stratum, t is moved into it.
    """
    position = noise.position
    # A batch lies in few windows: each is ordered once, so that memory goes with windows x n.
    windows, index = (position // window).unique(return_inverse=True)
    # perm_w ranks n keyed words: a permutation without any state, the same on every device.
    order = noise.at(windows).words(f"{stream}/window", window).argsort(dim=1, stable=True)
    rank = order.argsort(dim=1)[index, position % window]
    u = noise.uniform(stream, 1)[:, 0]
    part, parts = noise.stratum
    return (part + (rank.double() + u) / window) / parts


def spread_time(u: Tensor, power: float) -> tuple[Tensor, Tensor]:
    """(t, dt/du) for t = u^p: p > 1 moves samples towards the clean end.

    Bound weights grow as 1/t, so that uniform t gives an estimate of infinite variance; p = 2 cures
    1/t, p = 3 also the t^(-3/2) of noise whose mass goes as sqrt(t). The expectation is unchanged.
    """
    return u**power, power * u ** (power - 1.0)


def stratified_times(noise: NoiseKey, window: int, count: int, stream: str = "time") -> Tensor:
    """`count` times in (0, 1) for each position (one a block, or one a token), float64 [b, count].

    Over a window of n positions every stratum of width 1 / (n count) is hit exactly once: within a
    position the strata of width 1 / count come in keyed order, inside them the positions' own
    stratified times.
    """
    order = noise.words(f"{stream}/order", count).argsort(dim=1, stable=True)
    # argsort of random words is a random permutation; ties (one in 2^32) only favour the earlier.
    fine = stratified_time(noise, window, stream)[:, None]
    return (order.double() + fine) / count
