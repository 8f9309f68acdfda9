"""Report of `epochal plan` as tables for people."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from parallel.planner.machine import GIB
from parallel.planner.plan import Plan
from pretrain.planning.plan import Planned
from pretrain.planning.remedies import overrides
from pretrain.planning.report import distinct

Rows = list[tuple[str, ...]]


@dataclass(frozen=True)
class Section:
    """A titled table; the first row of `rows` is its header where `header` is set."""

    title: str
    rows: Rows
    header: bool = False


def sections(planned: Planned, top: int) -> list[Section]:
    """Sections of the report, in order."""
    parts = [_about(planned), _memory(planned.given), _step(planned)]
    parts += [_remedies(planned), _best(planned, top), _others(planned)]
    return [part for part in parts if part.rows]


def _about(planned: Planned) -> Section:
    model, machine, config = planned.model, planned.machine, planned.config
    assumed = " (assumed; no tokenizer file)" if planned.vocabulary_assumed else ""
    node = f"{machine.num_nodes} x {machine.gpus_per_node}"
    return Section(
        "Planned run",
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
    where = f"offloaded ({plan.candidate.offload}), not in the sum" if m.offloaded else "exact"
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
        ("update", state.update, "after the backward pass"),
        ("peak", m.total, f"stage {plan.stage + 1} of {len(plan.layers)}"),
        ("usable", plan.machine.usable_bytes, _verdict(plan)),
    ]
    if m.offloaded:
        short = plan.host_bytes > plan.machine.usable_host_bytes
        note = f"{'DOES NOT FIT: ' if short else ''}of {_gib(plan.machine.usable_host_bytes)}"
        rows.append(("host memory of a node", plan.host_bytes, note))
    shown = [(name, _gib(size), note) for name, size, note in rows if size]
    return Section(f"Memory of a rank: {_name(plan)}", list(shown))


def _recompute_note(plan: Plan) -> str:
    without = plan.memory.activations_without_recompute
    if plan.candidate.recompute == "none":
        return f"{plan.candidate.micro_batch_size} sequences a micro-batch"
    return f"{plan.candidate.recompute} recomputation; {_gib(without)} without"


def _verdict(plan: Plan) -> str:
    spare = -plan.lacking
    if spare < 0:
        return f"DOES NOT FIT: {_gib(-spare)} short"
    return f"fits{', but tightly' if plan.tight else ''}: {_gib(spare)} to spare"


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
        "offloading": t.offload,
    }
    sent = {"gradients, weights": "dp", "tensor messages": "tp", "context messages": "cp"}
    sent |= {"stage to stage": "pp", "offloading": "host"}
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
    return Section("Step time, and data that a rank sends", rows)


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


def _remedies(planned: Planned) -> Section:
    """Smallest changes after which the run fits."""
    rows: Rows = []
    for remedy in planned.remedies:
        plan = remedy.plan
        rows.append((remedy.change, f"{plan.time.total:.3f} s", f"MFU {100 * plan.mfu:.0f} %"))
    found = planned.found.fitting
    if planned.remedies:
        title = (
            "Smallest change that fits" if found else "No layout fits these GPUs; these changes fit"
        )
        return Section(title, rows)
    if found or planned.given.fits:
        return Section("", [])
    advice = "a shorter data.seq_length or a smaller model"
    return Section("No layout fits, even on more GPUs", [("take", advice)])


def _others(planned: Planned) -> Section:
    found = planned.found
    rows: Rows = []
    if found.fitting:
        best = found.fitting[0]
        rows.append(("best layout", " ".join(overrides(best))))
        if planned.given.fits:
            ratio = best.time.total / planned.given.time.total
            rows.append(("its step takes", f"{100 * ratio:.0f} % of the time of the given one"))
    if found.too_large:
        nearest = found.too_large[0]
        host = nearest.host_bytes - nearest.machine.usable_host_bytes
        lack = (
            _gib(nearest.lacking) if nearest.lacking > 0 else f"{_gib(host)} of host memory a node"
        )
        rows.append(
            (f"{len(found.too_large)} lack memory", f"the nearest, {_name(nearest)}, {lack}")
        )
    for reason, count in sorted(found.refused.items(), key=lambda item: -item[1])[:6]:
        rows.append((f"{count} refused", reason))
    return Section("Other layouts", rows)


def _name(plan: Plan) -> str:
    c = plan.candidate
    text = f"{c.layout}, ZeRO {c.zero_stage}, {c.micro_batch_size} x {c.num_microbatches}"
    return text if c.recompute == "none" else f"{text}, {c.recompute} recomputation"


def _gib(size: float) -> str:
    return f"{size / GIB:,.2f} GiB"


def show(parts: list[Section]) -> None:
    """Print tables on a terminal, aligned lines elsewhere."""
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
    from rich.text import Text

    console = Console()
    for part in parts:
        table = Table(title=part.title, title_justify="left", show_header=part.header)
        rows = part.rows
        for i in range(len(rows[0])):
            table.add_column(rows[0][i] if part.header else "")
        for row in rows[1:] if part.header else rows:
            table.add_row(*map(Text, row))  # brackets in a name are no markup
        console.print(table)
