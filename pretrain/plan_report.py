"""What `epochal plan` answers, as plain values for scripts and as tables for people."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

from parallel.planner.machine import GIB
from parallel.planner.plan import Plan
from pretrain.plan import Planned

Rows = list[tuple[str, ...]]


@dataclass(frozen=True)
class Section:
    """A titled table; the first row of `rows` is its header where `header` is set."""

    title: str
    rows: Rows
    header: bool = False


def overrides(plan: Plan) -> list[str]:
    """The settings with which `epochal train` runs this candidate."""
    c, layout = plan.candidate, plan.candidate.layout
    values: dict[str, Any] = {"parallel.data_parallel_size": layout.data_parallel_size}
    if layout.tensor_parallel_size > 1:
        values["parallel.tensor_parallel_size"] = layout.tensor_parallel_size
        values["parallel.sequence_parallel"] = str(layout.sequence_parallel).lower()
    if layout.pipeline_parallel_size > 1:
        values["parallel.pipeline_parallel_size"] = layout.pipeline_parallel_size
    if layout.context_parallel_size > 1:
        values["parallel.context_parallel_size"] = layout.context_parallel_size
    values["parallel.zero_stage"] = c.zero_stage
    values["train.micro_batch_size"] = c.micro_batch_size
    values["train.recompute"] = c.recompute
    return [f"{key}={value}" for key, value in values.items()]


def to_dict(planned: Planned, top: int) -> dict[str, Any]:
    """Everything, in bytes, seconds and tokens."""
    model, machine = planned.model, planned.machine
    return {
        "model": {
            "parameters": model.parameters,
            "non_embedding_parameters": model.non_embedding_parameters,
            "flops_per_token": model.flops_per_token,
            "vocab_size": planned.vocab_size,
            "vocabulary_assumed": planned.vocabulary_assumed,
        },
        "machine": {**machine.__dict__, "num_gpus": machine.num_gpus},
        "given": plan_dict(planned.given, planned),
        "best": [plan_dict(plan, planned) for plan in distinct(planned.found.fitting)[:top]],
        "num_fitting": len(planned.found.fitting),
        "num_too_large": len(planned.found.too_large),
        "refused": planned.found.refused,
    }


def plan_dict(plan: Plan, planned: Planned) -> dict[str, Any]:
    """One candidate."""
    m, t = plan.memory, plan.time
    result: dict[str, Any] = {
        "layout": str(plan.candidate.layout),
        "overrides": overrides(plan),
        "fits": plan.fits,
        "memory": {
            **m.state.__dict__,
            "teacher": m.teacher,
            "offloaded": m.offloaded,
            "activations": m.activations,
            "activations_without_recompute": m.activations_without_recompute,
            "logits": m.logits,
            "workspace": m.workspace,
            "total": m.total,
            "usable": plan.machine.usable_bytes,
            "stage": plan.stage,
        },
        "layers": list(plan.layers),
        "seconds": {
            **{k: v for k, v in t.__dict__.items() if k != "sent"},
            "total": t.total,
        },
        "sent_bytes": t.sent,
        "bubble_share": t.bubble_share,
        "mfu": plan.mfu,
        "tokens_per_second": plan.tokens_per_second,
        "tokens_per_day": plan.tokens_per_day,
    }
    if planned.tokens is not None:
        result["days"] = plan.days(planned.tokens)
        result["gpu_hours"] = plan.gpu_hours(planned.tokens)
        if planned.price is not None:
            result["cost"] = planned.price * plan.gpu_hours(planned.tokens)
    return result


def distinct(plans: tuple[Plan, ...]) -> list[Plan]:
    """The best plan of each layout and ZeRO stage, in the order given."""
    best: dict[tuple[str, int], Plan] = {}
    for plan in plans:
        best.setdefault((str(plan.candidate.layout), plan.candidate.zero_stage), plan)
    return list(best.values())


def sections(planned: Planned, top: int) -> list[Section]:
    """The report, part by part."""
    parts = [_about(planned), _memory(planned.given), _step(planned)]
    parts += [_best(planned, top), _others(planned)]
    return [part for part in parts if part.rows]


def _about(planned: Planned) -> Section:
    model, machine, config = planned.model, planned.machine, planned.config
    assumed = " (assumed: no tokenizer there; --vocab-size)" if planned.vocabulary_assumed else ""
    node = f"{machine.num_nodes} x {machine.gpus_per_node}"
    return Section(
        "What is planned",
        [
            (
                "model",
                f"{model.parameters:,} parameters, {model.non_embedding_parameters:,} without "
                f"embeddings",
            ),
            (
                "objective",
                f"{config.objective.name}, {model.flops_per_token / 1e9:.3g} GFLOP a token",
            ),
            (
                "batch",
                f"{config.train.global_batch_size:,} x {model.seq_length:,} tokens, "
                f"{config.train.precision}",
            ),
            ("vocabulary", f"{planned.vocab_size:,}{assumed}"),
            ("machine", f"{machine.name}: {node} GPUs of {machine.memory_gib:g} GiB"),
        ],
    )


def _memory(plan: Plan) -> Section:
    m, state = plan.memory, plan.memory.state
    where = "in host memory, not in the sum" if m.offloaded else "exact"
    rows = [
        ("parameters", state.parameters, "exact"),
        ("gradients", state.gradients, "as DeepSpeed keeps them"),
        ("optimizer", state.optimizer, where),
        ("averages (EMA)", state.averages, where),
        ("teacher", m.teacher, "a frozen copy"),
        ("activations", m.activations, _recompute_note(plan)),
        ("logits' gradient", m.logits, "last stage, at the loss"),
        ("workspace", m.workspace, "gradients of one layer"),
        ("gathered, buckets", state.gathered, "during backward"),
        ("update", state.update, "when activations are gone"),
        ("at the worst moment", m.total, f"stage {plan.stage + 1} of {len(plan.layers)}"),
        ("usable", plan.machine.usable_bytes, _verdict(plan)),
    ]
    shown = [(name, _gib(size), note) for name, size, note in rows if size]
    return Section(f"Memory of a rank: {_name(plan)}", list(shown))


def _recompute_note(plan: Plan) -> str:
    without = plan.memory.activations_without_recompute
    if plan.candidate.recompute == "none":
        return f"{plan.candidate.micro_batch_size} sequences a micro-batch"
    return f"{plan.candidate.recompute} recomputation; {_gib(without)} without"


def _verdict(plan: Plan) -> str:
    spare = plan.machine.usable_bytes - plan.memory.total
    return f"fits, {_gib(spare)} to spare" if plan.fits else f"DOES NOT FIT: {_gib(-spare)} short"


def _step(planned: Planned) -> Section:
    plan, t = planned.given, planned.given.time
    names = {
        "compute": t.compute,
        "tensor messages": t.tensor,
        "context messages": t.context,
        "stage to stage": t.pipeline,
        "pipeline bubble": t.bubble,
        "gradients, weights": t.data,
        "update": t.update,
    }
    sent = {"gradients, weights": "dp", "tensor messages": "tp", "context messages": "cp"}
    sent["stage to stage"] = "pp"
    rows: Rows = []
    for name, seconds in names.items():
        if seconds:
            bytes_sent = t.sent.get(sent.get(name, ""), 0.0)
            note = f"{100 * seconds / t.total:.0f} %"
            rows.append((name, f"{seconds:.3f} s", note, _gib(bytes_sent) if bytes_sent else ""))
    rows.append(("step", f"{t.total:.3f} s", f"MFU {100 * plan.mfu:.0f} %", ""))
    rows.append(("tokens a day", f"{plan.tokens_per_day / 1e9:,.2f} B", "", ""))
    if planned.tokens is not None:
        rows.append((f"{planned.tokens / 1e9:,.4g} B tokens", *_bill(plan, planned)))
    return Section("A step, and what a rank sends in it", rows)


def _bill(plan: Plan, planned: Planned) -> tuple[str, str, str]:
    assert planned.tokens is not None
    hours = plan.gpu_hours(planned.tokens)
    cost = f"{planned.price * hours:,.0f} at {planned.price:g}" if planned.price else ""
    return f"{plan.days(planned.tokens):,.2f} days", f"{hours:,.0f} GPU-hours", cost


def _best(planned: Planned, top: int) -> Section:
    header: tuple[str, ...] = ("layout", "ZeRO", "micro-batch", "recompute")
    header = (*header, "GiB", "step", "MFU", "bubble")
    if planned.tokens is not None:
        header = (*header, "days")
    rows: Rows = [header]
    best = distinct(planned.found.fitting)[:top]
    for plan in best:
        c = plan.candidate
        row: tuple[str, ...] = (
            str(c.layout),
            str(c.zero_stage),
            f"{c.micro_batch_size} x {c.num_microbatches}",
            c.recompute,
            f"{plan.memory.total / GIB:.1f}",
            f"{plan.time.total:.3f} s",
            f"{100 * plan.mfu:.0f} %",
            f"{100 * plan.time.bubble_share:.0f} %",
        )
        if planned.tokens is not None:
            row = (*row, f"{plan.days(planned.tokens):,.2f}")
        rows.append(row)
    if not best:
        return Section("No layout fits", [])
    return Section("Best layouts", rows, header=True)


def _others(planned: Planned) -> Section:
    found = planned.found
    rows: Rows = []
    if found.fitting:
        rows.append(("the best is", " ".join(overrides(found.fitting[0]))))
    if found.too_large:
        nearest = found.too_large[0]
        short = nearest.memory.total - nearest.machine.usable_bytes
        rows.append(
            (
                f"{len(found.too_large)} lack memory",
                f"the nearest, {_name(nearest)}, {_gib(short)}",
            )
        )
    if not found.fitting:
        rows.append(("none fits", "take more GPUs or GPUs with more memory, or a smaller model"))
    for reason, count in sorted(found.refused.items(), key=lambda item: -item[1])[:6]:
        rows.append((f"{count} refused", reason))
    return Section("The others", rows)


def _name(plan: Plan) -> str:
    c = plan.candidate
    text = f"{c.layout}, ZeRO {c.zero_stage}, {c.micro_batch_size} x {c.num_microbatches}"
    return text if c.recompute == "none" else f"{text}, {c.recompute} recomputation"


def _gib(size: float) -> str:
    return f"{size / GIB:,.2f} GiB"


def show(parts: list[Section]) -> None:
    """Tables on a terminal, aligned lines elsewhere."""
    if sys.stdout.isatty():
        _show_rich(parts)
        return
    for part in parts:
        print(f"{part.title}\n")
        widths = [max(len(row[i]) for row in part.rows) for i in range(len(part.rows[0]))]
        for row in part.rows:
            cells = zip(row, widths, strict=True)
            print("  " + "  ".join(f"{cell:<{width}}" for cell, width in cells).rstrip())
        print()


def _show_rich(parts: list[Section]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for part in parts:
        table = Table(title=part.title, title_justify="left", show_header=part.header)
        rows = part.rows
        for i in range(len(rows[0])):
            table.add_column(rows[0][i] if part.header else "")
        for row in rows[1:] if part.header else rows:
            table.add_row(*row)
        console.print(table)
