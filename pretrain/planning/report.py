"""Report of `epochal plan` as plain values, for scripts."""

from __future__ import annotations

from typing import Any

from parallel.planner.plan import Plan
from pretrain.planning.plan import Planned
from pretrain.planning.remedies import overrides


def to_dict(planned: Planned, top: int) -> dict[str, Any]:
    """Whole report, in bytes, seconds and tokens."""
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
        "remedies": [
            {"change": remedy.change, **plan_dict(remedy.plan, planned)}
            for remedy in planned.remedies
        ],
        "num_fitting": len(planned.found.fitting),
        "num_too_large": len(planned.found.too_large),
        "refused": planned.found.refused,
    }


def plan_dict(plan: Plan, planned: Planned) -> dict[str, Any]:
    """Numbers of one plan."""
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
            "host_of_a_node": plan.host_bytes,
            "usable_host_of_a_node": plan.machine.usable_host_bytes,
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
    """Best plan of each layout and ZeRO stage, in the order given."""
    best: dict[tuple[str, int], Plan] = {}
    for plan in plans:
        best.setdefault((str(plan.candidate.layout), plan.candidate.zero_stage), plan)
    return list(best.values())
