"""`epochal study worth`: the fresh tokens that a run is worth, by a baseline of one epoch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pretrain.cli.amounts import parse_amount
from pretrain.cli.output import Json, print_json, visible
from pretrain.cli.progress import format_amount
from pretrain.errors import ConfigError

if TYPE_CHECKING:
    from pretrain.planning.tables import Section
    from pretrain.study.efficiency import Baseline, Worth

PUBLISHED = "slowrun"
PUBLISHED_BUDGET = 1e8
"""Unique tokens of every run of NanoGPT Slowrun."""
LOSS = "validation/nats_per_token"


@dataclass(frozen=True)
class Measured:
    """A loss whose worth is asked."""

    label: str
    """Name of the arm, or of the folder."""
    loss: float
    """Nats per token."""
    error: float
    """Standard error; infinite where unknown, 0 for an exact likelihood of one seed."""
    unique_tokens: float | None
    """Budget that the worth is compared with; None where unknown."""
    likelihood: str = ""
    """`exact`, `bound`, or empty where unknown."""


def worth(
    folder: Annotated[
        Path | None,
        typer.Argument(metavar="[DIR]", help="Run folder: its best evaluation; study: each arm."),
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option(help="slowrun, or a study with runs of one epoch; default: the study DIR."),
    ] = None,
    arm: Annotated[
        str | None, typer.Option(help="Arm of the baseline study; default: the arm itself.")
    ] = None,
    loss: Annotated[
        float | None, typer.Option(help="Loss in nats per token, in place of DIR.")
    ] = None,
    error: Annotated[float, typer.Option(min=0, help="Standard error of --loss.")] = 0.0,
    unique_tokens: Annotated[
        str | None, typer.Option(help="Unique tokens of the run, e.g. 100M: the ratio to them.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Print the fresh tokens that one epoch of the baseline needs for the same loss.

    `epochal study worth --loss 3.001 --baseline slowrun`
    """
    budget = None
    if unique_tokens is not None:
        budget = parse_amount("--unique-tokens", unique_tokens)
        if budget <= 0:
            raise ConfigError(f"--unique-tokens is {unique_tokens}; give a positive number")
    measured = _measured(folder, loss, error, budget, baseline)
    chosen = baseline or (str(folder) if folder is not None and _is_study(folder) else None)
    if chosen is None:
        raise ConfigError(f"give --baseline: {PUBLISHED}, or a study with runs of one epoch")
    if chosen == PUBLISHED and arm is not None:
        raise ConfigError(f"--arm is for a study; the baseline {PUBLISHED} has no arms")
    every = _baselines(chosen)
    found = [(item, *_compared(item, every, arm, chosen)) for item in measured]
    notes = _notes(chosen, [(item, likelihood) for item, _, likelihood, _ in found])
    if as_json:
        print_json({"results": [_plain(i, b, w) for i, b, _, w in found], "warnings": notes})
        return
    from pretrain.planning.tables import show

    show(_sections([(item, base, value) for item, base, _, value in found], notes))


def _is_study(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("study.json", "table.parquet", "table.csv"))


def _measured(
    folder: Path | None,
    loss: float | None,
    error: float,
    budget: float | None,
    baseline: str | None,
) -> list[Measured]:
    """Losses that the command line names."""
    if (folder is None) == (loss is None):
        raise ConfigError("give either a folder (of a run or a study) or --loss, not both")
    if loss is not None:
        if not (math.isfinite(loss) and loss > 0 and math.isfinite(error)):
            raise ConfigError(f"--loss is {loss}, --error {error}; give finite nats per token")
        if budget is None and baseline == PUBLISHED:
            budget = PUBLISHED_BUDGET
        return [Measured("given loss", loss, error, budget)]
    assert folder is not None
    if error:
        raise ConfigError("--error is that of --loss; a folder has the errors of its evaluations")
    if _is_study(folder):
        from pretrain.study.early_stopping import outcomes
        from pretrain.study.report.build import read_table

        found = outcomes(read_table(folder))
        if not found:
            raise ConfigError(f"the study {folder} has no evaluation yet")
        return [
            Measured(o.arm, o.best.loss, o.best.error, budget or o.unique_tokens, o.likelihood)
            for o in found
        ]
    return [_of_run(folder, budget)]


def _of_run(folder: Path, budget: float | None) -> Measured:
    """Best evaluation of a run folder."""
    from pretrain.tracking.jsonl import read_metrics

    path = folder / "metrics.jsonl"
    if not path.exists():
        raise ConfigError(
            f"{folder} is neither a run (metrics.jsonl) nor a study (study.json, table.csv)"
        )
    rows = [row for row in read_metrics(path) if math.isfinite(row.get(LOSS, math.inf))]
    if not rows:
        raise ConfigError(f"{path} has no evaluation yet ({LOSS})")
    best = min(rows, key=lambda row: row[LOSS])
    noise = best.get("validation/noise_error")
    error = noise if noise is not None else best.get("validation/standard_error", math.inf)
    return Measured(
        folder.name or str(folder),
        best[LOSS],
        error,
        budget or _budget_of(folder),
        "exact" if noise == 0 else "bound",
    )


def _budget_of(folder: Path) -> float | None:
    """`data.unique_tokens` of a run; None where it is all of its data."""
    import yaml

    path = folder / "config.yaml"
    config = yaml.safe_load(path.read_text("utf-8")) if path.exists() else None
    given = ((config or {}).get("data") or {}).get("unique_tokens")
    return None if given is None else float(given)


def _baselines(name: str) -> dict[str, tuple[Baseline, str]]:
    """Baselines by arm with their kind of likelihood; the published one under an empty name."""
    from pretrain.study.efficiency import SLOWRUN, one_epoch_baseline

    if name == PUBLISHED:
        return {"": (SLOWRUN, "exact")}
    if not Path(name).is_dir():
        raise ConfigError(f"--baseline {name} is no folder; give {PUBLISHED}, or a study's folder")
    from pretrain.study.report.build import read_table

    table = read_table(Path(name))
    found = {}
    for arm, rows in table.groupby("arm"):
        baseline = one_epoch_baseline(table, str(arm))
        if baseline is not None:
            found[str(arm)] = (baseline, str(rows["likelihood"].iloc[0]))
    if not found:
        raise ConfigError(
            f"the study {name} has no finished run of one epoch; the baseline needs some, over "
            "several numbers of tokens"
        )
    return found


def _compared(
    item: Measured, every: dict[str, tuple[Baseline, str]], arm: str | None, name: str
) -> tuple[Baseline, str, Worth]:
    """Baseline of a loss with its likelihood, and its worth by it; raises ConfigError."""
    from pretrain.study.efficiency import worth as worth_of

    if arm is not None and arm not in every:
        raise ConfigError(
            f"--arm {arm}: the study {name} has runs of one epoch of {', '.join(every)}"
        )
    key = arm if arm is not None else item.label if item.label in every else None
    if key is None and len(every) == 1:
        key = next(iter(every))
    if key is None:
        raise ConfigError(
            f"{item.label} has no runs of one epoch in {name}; choose an arm that has: --arm "
            f"with one of {', '.join(every)}"
        )
    baseline, likelihood = every[key]
    error = item.error if math.isfinite(item.error) else 0.0
    return baseline, likelihood, worth_of(item.loss, baseline, error=error)


def _notes(name: str, pairs: list[tuple[Measured, str]]) -> list[str]:
    """Reasons to doubt the comparison."""
    corpus = (
        "the published baseline is for the 10M validation tokens of FineWeb of NanoGPT Slowrun, "
        "with its tokenizer: nats per token of another text or tokenizer cannot be compared"
        if name == PUBLISHED
        else "losses must be of the same validation text and tokenizer as those of the baseline"
    )
    notes = [corpus]
    if any(item.likelihood and item.likelihood != other for item, other in pairs):
        notes.append(
            "a bound stands beside an exact loss: the bound exceeds the loss, so that a run that "
            "is measured by a bound is worth more than stated"
        )
    if any(not math.isfinite(item.error) for item, _ in pairs):
        notes.append("the error of a loss is unknown: its interval has only that of the baseline")
    return notes


def _plain(item: Measured, baseline: Baseline, value: Worth) -> dict[str, Any]:
    """JSON values; infinite ones are null."""
    ends = {"low": value.low, "high": value.high, "error": item.error}
    return {
        "label": item.label,
        "unique_tokens": item.unique_tokens,
        "loss": item.loss,
        **{name: end if math.isfinite(end) else None for name, end in ends.items()},
        "tokens": value.tokens,
        "relation": value.relation,
        "ratio": None if item.unique_tokens is None else value.tokens / item.unique_tokens,
        "baseline": baseline.source,
    }


def _sections(found: list[tuple[Measured, Baseline, Worth]], notes: list[str]) -> list[Section]:
    """Tables for people."""
    from pretrain.planning.tables import Section

    rows: list[tuple[str, ...]] = [
        ("run", "unique tokens", "nats/token", "fresh tokens", "90 % interval", "times unique")
    ]
    for item, _, value in found:
        about = "" if value.relation == "equal" else f"{value.relation} "
        unique = item.unique_tokens
        rows.append(
            (
                item.label,
                "unknown" if unique is None else format_amount(unique),
                f"{item.loss:.3f}",
                about + format_amount(value.tokens),
                _interval(value),
                "" if unique is None else f"{about}{value.tokens / unique:.3g}x",
            )
        )
    sources = dict.fromkeys(baseline.source for _, baseline, _ in found)
    origin = [("baseline", source) for source in sources]
    parts = [
        Section("Worth in fresh tokens", rows, header=True),
        Section("Origin and limits", [*origin, *(("caution", text) for text in notes)]),
    ]
    return [
        Section(part.title, [tuple(map(visible, row)) for row in part.rows], part.header)
        for part in parts
    ]


def _interval(value: Worth) -> str:
    if value.low == value.high:
        return "none: no errors known"
    low = format_amount(value.low) if value.low > 0 else "below the baseline"
    high = format_amount(value.high) if math.isfinite(value.high) else "above the baseline"
    return f"{low} to {high}"
