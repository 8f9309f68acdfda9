"""Advice from fitted laws: objective, size and epochs for U unique tokens and a compute budget.

Every fit proposes its best allocation; the lowest predicted loss wins. Predictions outside the
data, and losses that cannot be compared, are named as such.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pretrain.errors import ConfigError
from pretrain.study.critical import (
    INTERVAL,
    REFERENCE,
    bound_bias,
    critical_line,
    num_resamples,
    published_critical,
)
from pretrain.study.fits.fitted import Fitted
from pretrain.study.fits.laws import InteriorOptimum, SingleEpoch, best_epochs
from pretrain.study.fits.published import published_law
from pretrain.study.frontier import best_allocation, outside, saturation, supported

PUBLISHED_PAIR = ("prabhudesai_autoregressive", "prabhudesai_masked")
"""Published laws of one study, whose losses can be compared."""
CLOSE = 0.01
"""Nats within which sizes count as equally good."""


@dataclass(frozen=True)
class Allocated:
    """Size and epochs with the loss that a law predicts for them."""

    params: float
    epochs: float
    flops: float
    loss: float
    """Nats per token."""


@dataclass(frozen=True)
class Option:
    """Best allocation by one fit."""

    fitted: Fitted
    best: Allocated
    """Spends less than the budget where more would gain next to nothing."""
    sizes: tuple[float, float]
    """Smallest and largest size whose predicted loss at this compute is within `CLOSE` nats."""
    supported: bool
    """True where `best` lies inside the range of the data."""
    measured: Allocated | None
    """Best one inside the range of the data; None where that holds none."""
    loss_interval: tuple[float, float] | None
    """90 % interval of the loss of `best`; None without resamples."""
    params_interval: tuple[float, float] | None
    """90 % interval of the best size."""
    epochs_interval: tuple[float, float] | None
    """90 % interval of the best number of epochs."""
    turn: float | None
    """Epochs of this size after which the loss rises; None where the law never does."""
    warnings: tuple[str, ...]
    """Reasons to doubt the prediction."""

    @property
    def label(self) -> str:
        """Objective and recipe."""
        return label(self.fitted)


@dataclass(frozen=True)
class Crossing:
    """Critical compute of one pair of fits at the budget of unique tokens."""

    challenger: str
    reference: str
    flops: float
    """Infinite where there is none, 0 where the challenger is better from one epoch on."""
    interval: tuple[float, float] | None
    distance: float
    """Compute budget over `flops`."""
    supported: bool
    """True where the data of both fits reach the crossing."""
    bias: str
    """Effect of likelihood bounds on the crossing."""


@dataclass(frozen=True)
class Advice:
    """Options in the order of their predicted losses, with the crossings between them."""

    unique_tokens: float
    flops: float
    options: tuple[Option, ...]
    crossings: tuple[Crossing, ...]
    published_critical: float
    """Critical compute by the printed law of arXiv 2507.15857, masked against autoregressive."""
    confidence: float | None
    """Share of resamples in which the first option is the best; None without resamples."""
    warnings: tuple[str, ...]
    """Remarks on the comparison as a whole."""

    @property
    def recommended(self) -> Option:
        """Option with the lowest predicted loss."""
        return self.options[0]


def published_pair() -> list[Fitted]:
    """Published fits that advice uses where none are given."""
    return [published_law(name) for name in PUBLISHED_PAIR]


def advise(fits: Sequence[Fitted], unique_tokens: float, flops: float) -> Advice:
    """Best objective, size and epochs by `fits` for `unique_tokens` and at most `flops`.

    Raises:
        ConfigError: No fit describes repeated tokens, where the budget repeats them.
    """
    options, left_out = [], []
    for fitted in fits:
        found = _option(fitted, unique_tokens, flops)
        if type(fitted.law) is SingleEpoch and found.best.epochs > 1 + 1e-9:
            left_out.append(
                f"{label(fitted)} is left out: its law knows no repetition and wants "
                f"{found.best.epochs:.3g} epochs"
            )
        else:
            options.append(found)
    if not options:
        raise ConfigError(
            "none of the fits describes repeated tokens, and this budget repeats them: "
            f"{'; '.join(left_out) or 'no fit was given'}. Give fits of a law for repeated data"
        )
    options.sort(key=lambda option: option.best.loss)
    used = [option.fitted for option in options]
    return Advice(
        unique_tokens=unique_tokens,
        flops=flops,
        options=tuple(options),
        crossings=tuple(_crossings(used, unique_tokens, flops)),
        published_critical=float(published_critical(unique_tokens)),
        confidence=_confidence(options, unique_tokens),
        warnings=(*left_out, *_comparison_warnings(used)),
    )


def label(fitted: Fitted) -> str:
    """Objective and recipe of a fit."""
    return f"{fitted.family} ({fitted.arm})" if fitted.arm else fitted.family


def _option(fitted: Fitted, unique: float, flops: float) -> Option:
    spent = min(flops, float(saturation(fitted, unique)))
    found = best_allocation(fitted, spent, unique)
    best = _allocated(fitted, float(found.params), float(found.epochs), unique)
    params = best.params * np.geomspace(1e-3, 1e3, 1201)
    losses = fitted.loss(params, best.flops / 6 / params, unique)
    close = params[losses <= best.loss + CLOSE]
    intervals: list[tuple[float, float] | None] = [None, None, None]
    if num_resamples(fitted):
        drawn = best_allocation(fitted, spent, unique, resampled=True)
        loss = fitted.resampled_loss(best.params, best.epochs * unique, unique)
        intervals = [_interval(values) for values in (loss, drawn.params, drawn.epochs)]
    return Option(
        fitted=fitted,
        best=best,
        sizes=(float(close.min()), float(close.max())),
        supported=bool(supported(fitted, best.params, best.epochs * unique, unique)),
        measured=_measured(fitted, unique, flops),
        loss_interval=intervals[0],
        params_interval=intervals[1],
        epochs_interval=intervals[2],
        turn=_turn(fitted, best.params, unique),
        warnings=tuple(_warnings(fitted, best, unique)),
    )


def _turn(fitted: Fitted, params: float, unique: float) -> float | None:
    """Best number of epochs of a size by a law that rises; None for other laws."""
    if not isinstance(fitted.law, InteriorOptimum):
        return None
    return best_epochs(fitted.values, params, unique)


def _allocated(fitted: Fitted, params: float, epochs: float, unique: float) -> Allocated:
    tokens = epochs * unique
    return Allocated(
        params, epochs, 6 * params * tokens, float(fitted.loss(params, tokens, unique))
    )


def _interval(values: np.ndarray) -> tuple[float, float]:
    low = np.quantile(values, INTERVAL[0], method="lower")
    return float(low), float(np.quantile(values, INTERVAL[1], method="higher"))


def _measured(fitted: Fitted, unique: float, flops: float) -> Allocated | None:
    """Best allocation on a grid over the range of the data, with at most `flops`."""
    ranges = fitted.support
    low, high = ranges.get("unique_tokens", (0.0, np.inf))
    if "params" not in ranges or "epochs" not in ranges or not low <= unique <= high:
        return None
    params = np.geomspace(*ranges["params"], 400)
    epochs = np.geomspace(*ranges["epochs"], 400)[:, None]
    tokens = epochs * unique
    spent = 6 * params * tokens
    fewest, most = ranges.get("tokens", (0.0, np.inf))
    least, largest = ranges.get("flops", (0.0, np.inf))
    inside = (spent <= min(flops, largest)) & (spent >= least)
    inside &= (tokens >= fewest) & (tokens <= most)
    if not inside.any():
        return None
    losses = np.where(inside, fitted.loss(params, tokens, unique), np.inf)
    row, column = np.unravel_index(losses.argmin(), losses.shape)
    return _allocated(fitted, float(params[column]), float(epochs[row, 0]), unique)


def _warnings(fitted: Fitted, best: Allocated, unique: float) -> list[str]:
    texts = []
    beyond = outside(fitted, best.params, best.epochs * unique, unique)
    for name, side in beyond.items():
        low, high = fitted.support[name]
        value = {"unique_tokens": unique, "tokens": best.epochs * unique, **vars(best)}[name]
        texts.append(
            f"outside the data: {name.replace('_', ' ')} {value:,.4g} lies {side} the "
            f"measured {low:,.4g} to {high:,.4g}"
        )
    if not fitted.support:
        texts.append("the range of its data is not recorded, so this may be extrapolation")
    measured = fitted.support.get("epochs", (1.0, 1.0))[1]
    if fitted.law.monotone and best.epochs > measured:
        texts.append(
            f"the law cannot rise, runs can: epochs beyond the measured {measured:.4g} are "
            "extrapolation"
        )
    elif fitted.law.monotone and best.epochs > 1 + 1e-9:
        texts.append("the law cannot rise: it does not know overfitting")
    if not num_resamples(fitted):
        texts.append("the fit has no resamples: no interval")
    return [*texts, *fitted.warnings]


def _crossings(fits: Sequence[Fitted], unique: float, flops: float) -> list[Crossing]:
    found = []
    for ours in (fitted for fitted in fits if fitted.family != REFERENCE):
        for theirs in (fitted for fitted in fits if fitted.family == REFERENCE):
            line = critical_line(ours, theirs, [unique])
            at = float(line.flops[0])
            band = line.band
            found.append(
                Crossing(
                    challenger=f"{label(ours)}, {ours.likelihood}",
                    reference=f"{label(theirs)}, {theirs.likelihood}",
                    flops=at,
                    interval=None if band is None else (float(band[0][0]), float(band[1][0])),
                    distance=flops / at if at else np.inf,
                    supported=bool(line.supported[0]),
                    bias=bound_bias(ours, theirs),
                )
            )
    return found


def _confidence(options: Sequence[Option], unique: float) -> float | None:
    """Share of resamples, paired by number, in which the first option is the best."""
    counts = [num_resamples(option.fitted) for option in options]
    number = min((n for n in counts if n), default=0)
    if not number or len(options) < 2:
        return None
    losses = []
    for option, count in zip(options, counts, strict=True):
        at = option.best
        drawn = option.fitted.resampled_loss(at.params, at.epochs * unique, unique)[:number]
        losses.append(drawn if count else np.full(number, at.loss))
    return float((np.argmin(losses, axis=0) == 0).mean())


def _comparison_warnings(fits: Sequence[Fitted]) -> list[str]:
    texts = []
    sources = {fitted.source for fitted in fits}
    if len(sources) > 1 and sources != {fitted.source for fitted in published_pair()}:
        texts.append(
            "the fits have different origins: losses of different texts or tokenizers cannot be "
            "compared"
        )
    if len({fitted.likelihood for fitted in fits}) > 1:
        texts.append("exact losses stand beside bounds, which are never below the exact loss")
    return texts
