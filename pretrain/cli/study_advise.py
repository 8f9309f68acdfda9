"""`epochal study advise`: objective, size and epochs for a budget, from fitted laws."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pretrain.cli.amounts import parse_amount
from pretrain.cli.output import Json, print_json, visible
from pretrain.cli.progress import format_amount

if TYPE_CHECKING:
    from pretrain.planning.tables import Section
    from pretrain.study.advise import Advice, Allocated, Crossing, Option
    from pretrain.study.fits.fitted import Fitted


def advise(
    unique_tokens: Annotated[
        str, typer.Option("--unique-tokens", help="Unique tokens U, e.g. 100M.")
    ],
    flops: Annotated[str, typer.Option("--flops", help="Training FLOPs, 6 N D, e.g. 1e21.")],
    fits: Annotated[
        list[str] | None,
        typer.Option(
            "--fits",
            metavar="FILE",
            help="JSON list of fits, or the name of a published law; may be repeated. Default: "
            "the published laws of arXiv 2507.15857.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Objective, size and epochs with the lowest predicted loss, with intervals and provenance.

    `epochal study advise --unique-tokens 100M --flops 1e21`
    """
    from pretrain.errors import ConfigError
    from pretrain.planning.tables import show
    from pretrain.study.advise import advise as find_advice
    from pretrain.study.advise import published_pair

    amounts = {"--unique-tokens": unique_tokens, "--flops": flops}
    parsed = {name: parse_amount(name, text) for name, text in amounts.items()}
    limits = {"--unique-tokens": (1e3, 1e15), "--flops": (1e6, 1e35)}
    for name, value in parsed.items():
        low, high = limits[name]
        if not low <= value <= high:
            raise ConfigError(
                f"{name} is {amounts[name]}; it must lie between {low:g} and {high:g}"
            )
    given = [law for name in fits for law in read_fits(name)] if fits else published_pair()
    advice = find_advice(given, parsed["--unique-tokens"], parsed["--flops"])
    if as_json:
        print_json(to_dict(advice))
    else:
        show(sections(advice))


def read_fits(name: str) -> list[Fitted]:
    """Fits of a JSON file (a list, or an object by name), or the published law of that name.

    Raises:
        ConfigError: A missing or malformed file, or a law with unusable coefficients.
    """
    from pretrain.errors import ConfigError
    from pretrain.study.fits.published import published

    path = Path(name)
    if name in published() and not path.exists():
        return [published()[name]]
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"--fits {name} cannot be read ({error}); give a JSON file of fits, or a published "
            f"law: {', '.join(published())}"
        ) from error
    try:
        stored = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"--fits {name} is no JSON: {error}") from error
    if isinstance(stored, dict):
        stored = list(stored.values())
    if not isinstance(stored, list) or not stored:
        raise ConfigError(f"--fits {name} must be a list of one fit or more")
    return [_fit(entry, f"--fits {name}, entry {i + 1}") for i, entry in enumerate(stored)]


def _fit(entry: Any, where: str) -> Fitted:
    """Checked fit of a JSON object."""
    from pydantic import TypeAdapter, ValidationError

    from pretrain.errors import ConfigError
    from pretrain.study.fits.fitted import Fitted
    from pretrain.study.fits.laws import LAWS

    if not isinstance(entry, dict):
        raise ConfigError(f"{where}: a fit is an object, not {type(entry).__name__}")
    try:
        TypeAdapter(Fitted).validate_python(entry)
        fitted = Fitted.from_dict(entry)
    except ValidationError as error:
        first = error.errors()[0]
        at = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"{where} is no fit: {at}: {first['msg']}") from error
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{where} is no fit: {error}") from error
    if fitted.law_name not in LAWS:
        raise ConfigError(f"{where}: unknown law {fitted.law_name!r}; there are {', '.join(LAWS)}")
    for name in LAWS[fitted.law_name].coefficients:
        value = fitted.values.get(name)
        least = 0.0 if name == "E" else math.ulp(0.0)
        if not isinstance(value, (int, float)) or not least <= value < math.inf:
            raise ConfigError(f"{where}: coefficient {name} is {value!r}; it must be positive")
    lengths = {len(values) for values in fitted.resamples.values()}
    if fitted.resamples and (len(lengths) > 1 or set(fitted.resamples) != set(fitted.values)):
        raise ConfigError(f"{where}: resamples need as many values of every coefficient")
    return fitted


def to_dict(advice: Advice) -> dict[str, Any]:
    """Advice as JSON values; infinite and undefined numbers are null."""
    return _finite(
        {
            "unique_tokens": advice.unique_tokens,
            "flops": advice.flops,
            "recommended": advice.recommended.fitted.family,
            "confidence": advice.confidence,
            "options": [_option_dict(option) for option in advice.options],
            "crossings": [
                {**asdict(crossing), "kind": _kind(crossing)} for crossing in advice.crossings
            ],
            "published_critical_flops": advice.published_critical,
            "warnings": list(advice.warnings),
        }
    )


def _option_dict(option: Option) -> dict[str, Any]:
    fitted = option.fitted
    about = {
        "family": fitted.family,
        "arm": fitted.arm,
        "likelihood": fitted.likelihood,
        "law": fitted.law_name,
        "source": fitted.source,
    }
    numbers = {k: v for k, v in asdict(option).items() if k != "fitted"}
    return {**about, **numbers}


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _kind(crossing: Crossing) -> str:
    """State of a crossing: `none`, `from one epoch on` or `crossing`."""
    if math.isinf(crossing.flops):
        return "none"
    return "crossing" if crossing.flops else "from one epoch on"


def sections(advice: Advice) -> list[Section]:
    """Tables of the advice for people."""
    from pretrain.planning.tables import Section

    header = ("objective", "loss is", "size", "epochs", "FLOPs", "nats/token", "sizes as good")
    best: list[tuple[str, ...]] = [header]
    measured: list[tuple[str, ...]] = [("objective", "size", "epochs", "FLOPs", "nats/token")]
    for option in advice.options:
        sizes = f"{format_amount(option.sizes[0])} to {format_amount(option.sizes[1])}"
        best.append((option.label, option.fitted.likelihood, *_cells(option), sizes))
        if option.measured is not None:
            measured.append((option.label, *_plain(option.measured)))
    title = (
        f"{format_amount(advice.unique_tokens)} unique tokens, {advice.flops:.3g} FLOPs: "
        "predicted best use, best objective first"
    )
    parts = [Section(title, best, header=True), _verdict(advice)]
    if len(measured) > 1:
        parts.append(Section("Best use inside the measured range", measured, header=True))
    parts.append(_crossing_section(advice))
    doubts = [("comparison", text) for text in advice.warnings]
    doubts += [(o.label, text) for o in advice.options for text in o.warnings]
    parts.append(Section("Warnings", list(doubts)))
    origins = [(o.label, o.fitted.source or "not recorded") for o in advice.options]
    parts.append(Section("Origin of the laws", list(origins)))
    return [
        Section(part.title, [tuple(map(visible, row)) for row in part.rows], part.header)
        for part in parts
        if part.rows
    ]


def _cells(option: Option) -> tuple[str, ...]:
    best = option.best
    return (
        _with_interval(format_amount(best.params), option.params_interval, format_amount),
        _with_interval(_number(best.epochs), option.epochs_interval, _number),
        f"{best.flops:.2e}",
        _with_interval(f"{best.loss:.3f}", option.loss_interval, "{:.3f}".format),
    )


def _plain(found: Allocated) -> tuple[str, ...]:
    size = format_amount(found.params)
    return size, _number(found.epochs), f"{found.flops:.2e}", f"{found.loss:.3f}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _with_interval(text: str, interval: tuple[float, float] | None, form: Any) -> str:
    return text if interval is None else f"{text} ({form(interval[0])} to {form(interval[1])})"


def _verdict(advice: Advice) -> Section:
    from pretrain.planning.tables import Section

    first = advice.recommended
    rows: list[tuple[str, ...]] = [("take", f"{first.label}, {first.best.loss:.3f} nats/token")]
    if len(advice.options) > 1:
        second = advice.options[1]
        ahead = second.best.loss - first.best.loss
        rows.append(("below the next", f"{ahead:.3f} nats, {second.label}"))
    if advice.confidence is not None:
        rows.append(("resamples that agree", f"{100 * advice.confidence:.0f} %"))
    if first.best.flops < 0.99 * advice.flops:
        rows.append(("spend", f"{first.best.flops:.2e} FLOPs; more would gain next to nothing"))
    if first.turn is not None:
        text = "never" if math.isinf(first.turn) else f"after {_number(first.turn)} epochs"
        rows.append(("loss of this size rises", text))
    if not first.supported:
        rows.append(("CAUTION", "this lies outside the measured range; see the warnings"))
    return Section("Verdict", rows)


def _crossing_section(advice: Advice) -> Section:
    from pretrain.planning.tables import Section

    rows: list[tuple[str, ...]] = []
    for found in advice.crossings:
        rows.append(("pair", f"{found.challenger} against {found.reference}"))
        text = {"none": "no crossing", "from one epoch on": "better from one epoch on"}.get(
            _kind(found), f"{found.flops:.2e} FLOPs, the budget is {found.distance:.3g} times that"
        )
        rows.append(("crossing of the laws", text))
        if found.interval is not None:
            rows.append(("90 % interval", f"{found.interval[0]:.2e} to {found.interval[1]:.2e}"))
        rows.append(("the data reach it", "yes" if found.supported else "NO: extrapolation"))
        if found.bias:
            rows.append(("likelihoods", found.bias))
    if rows:
        law = f"{advice.published_critical:.2e} FLOPs (2.12e15 (U/1M)^2.174, arXiv 2507.15857)"
        rows.append(("printed law", law))
    return Section("Critical compute", rows)
