"""Report of `epochal study plan`: runs, FLOPs, hours and data, as tables or as JSON."""

from __future__ import annotations

from typing import Any

from pretrain.cli.output import print_json
from pretrain.planning.tables import Section, show
from pretrain.study.runner.budget import Cost, Data, costs_of, data_needed
from pretrain.study.runner.planned import Planned
from pretrain.study.runner.settings import Study


def show_costs(
    study: Study,
    runs: list[Planned],
    *,
    machine: str | None,
    gpus: int | None,
    price: float | None,
    flops_per_second: float | None,
    as_json: bool,
) -> None:
    """Print what a study costs."""
    costs, data = costs_of(runs, machine, flops_per_second), data_needed(runs)
    totals = _totals(costs, gpus, price)
    if as_json:
        print_json(
            {
                "study": study.name,
                "learning_rate": study.learning_rate.model_dump(),
                "runs": [cost.to_dict() for cost in costs],
                "total": totals,
                "data": [d.__dict__ for d in data],
            }
        )
        return
    show([_runs(costs, machine), _total(study, totals, len(costs), machine), _data(data)])


def _totals(costs: list[Cost], gpus: int | None, price: float | None) -> dict[str, Any]:
    """Sums over all runs, None where they are unknown."""
    hours = _sum(cost.gpu_hours for cost in costs)
    left = [cost for cost in costs if not cost.done]
    return {
        "runs": len(costs),
        "done": len(costs) - len(left),
        "tokens": sum(cost.facts.spent_tokens for cost in costs),
        "share_of_separate_runs": _share(costs),
        "flops_6nd": sum(cost.facts.flops_6nd for cost in costs),
        "flops": sum(cost.flops for cost in costs),
        "gpu_hours": hours,
        "days": None if hours is None or gpus is None else hours / gpus / 24,
        "cost": None if hours is None or price is None else hours * price,
        "hours_left_here": _sum(cost.hours for cost in left) if left else 0.0,
    }


def _share(costs: list[Cost]) -> float | None:
    """Counted FLOPs over those of separate runs; None in a study without branches."""
    if not any(cost.facts.trunk for cost in costs):
        return None
    per_token = [cost.flops / cost.facts.spent_tokens for cost in costs]
    separate = sum(
        flops * cost.facts.tokens
        for flops, cost in zip(per_token, costs, strict=True)
        if not cost.facts.trunk
    )
    return sum(cost.flops for cost in costs) / separate


def _sum(values: Any) -> float | None:
    found = list(values)
    return None if None in found else sum(found)


def _runs(costs: list[Cost], machine: str | None) -> Section:
    header = ["run", "params", "no embeddings", "U", "epochs", "tokens", "FLOPs 6ND", "counted"]
    header += ["GPU-hours"] if machine else []
    header += ["hours here"] if any(cost.hours is not None for cost in costs) else []
    rows = [tuple(header)]
    for cost in costs:
        facts = cost.facts
        cells = [
            facts.run,
            f"{facts.params:,}",
            f"{facts.params_non_embedding:,}",
            f"{facts.unique_tokens:,}",
            f"{facts.planned_epochs:g}",
            f"{facts.tokens:.3g}",
            f"{facts.flops_6nd:.3g}",
            f"{cost.flops:.3g}",
        ]
        if machine:
            cells.append(f"{cost.gpu_hours:,.3g}{'' if cost.fits else ' DOES NOT FIT'}")
        if "hours here" in header:
            cells.append("done" if cost.done else _number(cost.hours))
        rows.append(tuple(cells))
    return Section("Runs", rows, header=True)


def _total(study: Study, totals: dict[str, Any], count: int, machine: str | None) -> Section:
    rule = study.learning_rate
    rows: list[tuple[str, ...]] = [
        ("runs", f"{count:,}, {totals['done']:,} of them done"),
        ("tokens", f"{totals['tokens']:.4g}"),
        ("FLOPs", f"{totals['flops_6nd']:.4g} by 6ND, {totals['flops']:.4g} counted"),
        ("learning rate", f"{rule.rule}{f': {rule.note}' if rule.note else ''}"),
    ]
    if totals["share_of_separate_runs"] is not None:
        share = totals["share_of_separate_runs"]
        rows.append(("branches", f"{share:.1%} of the FLOPs of separate runs"))
    if totals["gpu_hours"] is not None:
        rows.append((f"on {machine}", f"{totals['gpu_hours']:,.4g} GPU-hours"))
    for key, unit in (("days", "days on these GPUs"), ("cost", "for all GPU-hours")):
        if totals[key] is not None:
            rows.append((key, f"{totals[key]:,.4g} {unit}"))
    if totals["hours_left_here"] is not None:
        text = f"{totals['hours_left_here']:,.3g} hours left, one run after the other"
        rows.append(("on this machine", text))
    return Section(f"Study {study.name}", rows)


def _data(data: list[Data]) -> Section:
    rows: list[tuple[str, ...]] = []
    for found in data:
        rows.append(("training", f"{found.unique_tokens:,} unique tokens", found.train))
        scored = found.validation_sequences
        text = "all of it" if scored is None else f"{scored:,} sequences"
        rows.append(("validation", text, found.validation))
    return Section("Data", rows)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,.3g}"
