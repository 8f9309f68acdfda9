"""Noise levels, stratified over fixed windows of consecutive positions of the run.

Within a window of n positions every stratum [k/n, (k+1)/n) is used exactly once, in a keyed order
that is new for each window. So no rank, document or batch index is tied to a noise level, as it
would be if a sorted vector were split over ranks. The global batch size may change, because n
belongs to the run.
"""

from __future__ import annotations

from torch import Tensor

from pretrain.noise.key import NoiseKey


def stratified_time(noise: NoiseKey, window: int, stream: str = "time") -> Tensor:
    """Draw t in (0, 1) for each position of `noise`, float64 [b]; `window` is n.

    t_g = (perm_w(g mod n) + u_g) / n with w = g // n (variance reduction of MDLM, arXiv 2406.07524,
    independent of the layout). Where `noise` names a stratum, t is moved into it.
    """
    position = noise.position
    # A batch lies in few windows, and each is ordered once: memory is that of windows x n.
    windows, index = (position // window).unique(return_inverse=True)
    # perm_w is the ranks of n keyed words: a permutation without state, equal on every device.
    order = noise.at(windows).words(f"{stream}/window", window).argsort(dim=1, stable=True)
    rank = order.argsort(dim=1)[index, position % window]
    u = noise.uniform(stream, 1)[:, 0]
    part, parts = noise.stratum
    return (part + (rank.double() + u) / window) / parts


def spread_time(u: Tensor, power: float) -> tuple[Tensor, Tensor]:
    """Compute (t, dt/du) for t = u^p; p > 1 moves samples towards the clean end.

    Weights of the bound grow as 1/t, so that uniform t gives an estimate of infinite variance. It
    is finite with p = 2 for 1/t, and with p = 3 also for the t^(-3/2) of noise whose mass goes as
    sqrt(t). The expectation is unchanged.
    """
    return u**power, power * u ** (power - 1.0)


def stratified_times(noise: NoiseKey, window: int, count: int, stream: str = "time") -> Tensor:
    """Draw `count` times in (0, 1) for each position (a block or a token each), float64 [b, count].

    Over a window of n positions every stratum of width 1 / (n count) is used exactly once. Within a
    position the strata of width 1 / count come in keyed order; inside a stratum the time is the
    stratified time of the position.
    """
    order = noise.words(f"{stream}/order", count).argsort(dim=1, stable=True)
    # argsort of random words is a random permutation; ties (one in 2^32) only favour the earlier.
    fine = stratified_time(noise, window, stream)[:, None]
    return (order.double() + fine) / count
