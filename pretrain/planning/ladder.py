"""Table of packaged models: sizes, operations and a layout for one and for eight nodes.

The ladders of two papers are left out; their sizes lie between those of the table.
`epochal plan --models` prints it; `docs/planning.md` holds the printed table, and a test compares
the two. Layouts are the planner's best for an autoregressive run in bfloat16 with 1,024 sequences
of 2,048 tokens a step and a vocabulary of 32,000, on H100 with 80 GB and on H200 with 141 GB.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from parallel.planner.machine import GIB
from parallel.planner.plan import Search, search
from pretrain.config.compose import validate
from pretrain.config.groups import groups
from pretrain.config.run import Config
from pretrain.planning.machines import MACHINES, load_machine
from pretrain.planning.plan import costs, search_space

VOCABULARY, LENGTH = 32_000, 2048
PLANNED = ("h100x8", "h100x64", "h200x8", "h200x64")
PAPERS = ("chinchilla_", "smdm_")
"""Beginnings of the names of the ladders of arXiv 2507.15857 and 2602.15014."""
HEADER = (
    "| model | parameters | without embeddings | GFLOP a token: AR | masked | "
    "8 H100 | 64 H100 | 8 H200 | 64 H200 |\n|---|---:|---:|---:|---:|---|---|---|---|"
)


def tabled_models() -> list[str]:
    """Names of the packaged models without the ladders of the papers."""
    return [name for name in groups()["model"] if not name.startswith(PAPERS)]


def ladder_table(models: Iterable[str] | None = None) -> str:
    """Markdown table of packaged models, smallest first; of all unless some are named."""
    rows = sorted(map(_row, tabled_models() if models is None else models))
    return "\n".join([HEADER, *(text for _, text in rows)])


def ladder_config(name: str, objective: str = "autoregressive") -> Config:
    """Configuration with which a packaged model is planned."""
    import yaml

    shape = yaml.safe_load((MACHINES.parent / "model" / f"{name}.yaml").read_text())
    values: dict[str, Any] = {
        "data": {"train": "-", "validation": "-", "tokenizer": "-", "seq_length": LENGTH},
        "model": shape,
        "objective": {"name": objective},
        "train": {"precision": "bfloat16", "global_batch_size": 1024},
    }
    return validate(values)


def _row(name: str) -> tuple[int, str]:
    config = ladder_config(name)
    model = costs(config, VOCABULARY)
    masked = costs(ladder_config(name, "masked"), VOCABULARY)
    cells = [
        f"`{name}`",
        f"{model.parameters / 1e6:,.1f} M",
        f"{model.non_embedding_parameters / 1e6:,.2f} M",
        f"{model.flops_per_token / 1e9:.3g}",
        f"{masked.flops_per_token / 1e9:.3g}",
    ]
    for machine in map(load_machine, PLANNED):
        cells.append(_layout(search(model, machine, search_space(config, machine))))
    return model.non_embedding_parameters, f"| {' | '.join(cells)} |"


def _layout(found: Search) -> str:
    """Text of the best layout, with its memory and MFU."""
    if not found.fitting:
        return "none fits"
    best = found.fitting[0]
    c = best.candidate
    recompute = "" if c.recompute == "none" else f", {c.recompute}"
    stage = "" if c.zero_stage == 1 else f", ZeRO {c.zero_stage}"
    return (
        f"{c.layout}{stage}, {c.micro_batch_size} x {c.num_microbatches}{recompute}: "
        f"{best.memory.total / GIB:.0f} GiB, {100 * best.mfu:.0f} %"
    )
