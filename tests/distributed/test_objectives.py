"""Every further objective through the whole loop: one curve in any layout, also after a death."""

from __future__ import annotations

from pathlib import Path

import pytest
import runs
import torch
from comparison import assert_same_checkpoint, assert_same_curve, assert_same_run
from harness import Died, run_ranks

SETTINGS = {
    # At eps 1e-8 Adam steps on the rounding of tiny gradients: norms differ by 3e-5 after 13 steps.
    "duo": [
        "objective.curriculum_sequences=60",
        "objective.curriculum_temperature=[0.3,0.05]",
        "optimizer.eps=1e-6",
    ],
    "distillation": ["objective.round_sequences=40", "objective.first_gap=0.25"],
    # It adapts to 1,024 measurements: a third of the forward passes.
    "block": ["evaluation.batch_size=24"],
}
"""What makes a curriculum end, and rounds begin, within the 117 sequences of a run."""
WITHOUT_STATE = [
    "uniform",
    "interpolating",
    "gidd",
    "esoteric",
    "esoteric_hybrid",
    "autoregressive_orders",
]
"""Objectives that keep nothing between steps, as unit tests show."""
TENSOR = ["parallel.zero_stage=1", "parallel.tensor_parallel_size=2"]


def chosen(objective: str, *more: str) -> tuple[str, ...]:
    """Overrides that pick an objective."""
    return (f"objective={objective}", *SETTINGS.get(objective, ()), *more)


@pytest.mark.parametrize(
    ("objective", "ranks", "layout"),
    [
        ("duo", 2, ["parallel.zero_stage=1"]),
        ("distillation", 2, ["parallel.zero_stage=2", "train.micro_batch_size=2"]),
        ("distillation", 2, [*TENSOR, "parallel.sequence_parallel=true"]),
        ("block", 2, TENSOR),
        # They keep nothing between steps; test_layout_invariance.py trains them in every layout.
        pytest.param("gidd", 2, TENSOR, marks=pytest.mark.slow),
        pytest.param(
            "esoteric_hybrid",
            2,
            ["parallel.zero_stage=2", "train.micro_batch_size=1"],
            marks=pytest.mark.slow,
        ),
        pytest.param("autoregressive_orders", 2, ["parallel.zero_stage=1"], marks=pytest.mark.slow),
        pytest.param("duo", 4, TENSOR, marks=pytest.mark.slow),
        pytest.param(
            "distillation", 4, [*TENSOR, "parallel.sequence_parallel=true"], marks=pytest.mark.slow
        ),
        pytest.param("block", 4, TENSOR, marks=pytest.mark.slow),
    ],
    ids=lambda value: (
        "-".join(v.split(".")[-1] for v in value) if isinstance(value, list) else None
    ),
)
def test_every_layout_gives_the_one_rank_curve(
    pool: Path,
    tmp_path: Path,
    undisturbed,
    objective: str,
    ranks: int,
    layout: list[str],
):
    more = chosen(objective, *layout)
    assert run_ranks(ranks, runs.train, pool, tmp_path, *more) == [0] * ranks
    assert_same_curve(tmp_path, undisturbed(*chosen(objective)))


@pytest.mark.parametrize(
    ("objective", "layout"),
    [
        ("autoregressive", ["parallel.context_parallel_size=2"]),
        ("masked", ["parallel.pipeline_parallel_size=2"]),
    ],
)
def test_documents_kept_apart_give_one_curve_too(
    pool: Path, tmp_path: Path, undisturbed, objective: str, layout: list[str]
):
    """Their bounds are whole on every context rank and on every stage."""
    more = (f"objective={objective}", "data.documents=masked")
    given = (*more, "parallel.zero_stage=1", *layout)
    assert run_ranks(2, runs.train, pool, tmp_path, *given) == [0, 0]
    assert_same_curve(tmp_path, undisturbed(*more))


@pytest.mark.parametrize(
    "objective",
    [
        *("duo", "block", "gaussian", "distillation"),
        *(pytest.param(name, marks=pytest.mark.slow) for name in WITHOUT_STATE),
    ],
)
def test_a_killed_and_resumed_run_is_bitwise_the_undisturbed_one(
    pool: Path,
    tmp_path: Path,
    undisturbed,
    objective: str,
):
    more = chosen(objective, "parallel.zero_stage=0")
    died = run_ranks(
        1, runs.train, pool, tmp_path, *more, launcher=False, may_die=True, kill_at=11, when="after"
    )
    assert died == [Died(-9)]
    assert run_ranks(1, runs.train, pool, tmp_path, *more, launcher=False) == [0]
    assert_same_run(tmp_path, undisturbed(*chosen(objective)))


def test_a_teacher_survives_a_death_in_half_precision(pool: Path, tmp_path: Path):
    """Bitwise in the middle of a round, beside masters, averages and a student in bfloat16; the
    teacher is the student as it was when the round began."""
    more = chosen("distillation", "train.precision=bfloat16", "parallel.zero_stage=2")
    more += ("train.ema_decay=0.9", "train.checkpoint_interval=5")
    for name, deaths in (("whole", []), ("broken", [12])):
        run = tmp_path / name
        for step in deaths:
            died = run_ranks(
                1, runs.train, pool, run, *more, launcher=False, may_die=True, kill_at=step,
                when="after",
            )  # fmt: skip
            assert died == [Died(-9)]
        assert run_ranks(1, runs.train, pool, run, *more, launcher=False) == [0]
    assert_same_checkpoint(tmp_path / "broken", tmp_path / "whole")
    whole = runs.checkpoint(tmp_path / "whole", runs.STEPS)
    start = runs.checkpoint(tmp_path / "whole", 10)  # position 80: the third round begins
    taught = [name for name in whole if name.startswith("teacher/")]
    assert len(taught) > 10
    for name in taught:
        weight = start[name.removeprefix("teacher/")].bfloat16().float()
        assert torch.equal(whole[name], weight), name


def test_the_first_teacher_is_what_the_run_starts_from(undisturbed, pool: Path, tmp_path: Path):
    """Weights of another run, not the seed's: the student has moved on after a step."""
    from safetensors.torch import save_file

    loaded = runs.checkpoint(undisturbed(*chosen("duo")), runs.STEPS)
    given = {n: t for n, t in loaded.items() if n != "state" and not n.startswith("exp_avg")}
    save_file(given, tmp_path / "uniform.safetensors")
    more = chosen("distillation", f"run.init_from={tmp_path / 'uniform.safetensors'}")
    run = tmp_path / "run"
    assert run_ranks(2, runs.train, pool, run, *more, "train.stop_step=2") == [0, 0]
    after = runs.checkpoint(run, 2)
    for name, tensor in given.items():
        assert torch.equal(after[f"teacher/{name}"], tensor), name
    assert not torch.equal(after["model.embedding.weight"], given["model.embedding.weight"])


@pytest.mark.parametrize(
    ("objective", "sampler"),
    [
        ("duo", "ancestral"),
        ("distillation", "ancestral"),
        ("block", "block"),
        ("esoteric_hybrid", "esoteric"),
        ("gaussian", "ancestral"),
    ],
)
def test_a_finished_run_is_evaluated_and_sampled(
    undisturbed, pool: Path, objective: str, sampler: str
):
    """The bound is the one that training logged; samples have no <mask> and can be drawn again."""
    run = undisturbed(*chosen(objective))
    result, samples = run_ranks(1, look_at, run, launcher=False)[0]
    logged = runs.log(run)[runs.STEPS]["validation/nats_per_token"]
    assert result["nats_per_token"] == pytest.approx(logged, rel=1e-6)
    assert result["is_bound"]
    if result["parts"]:
        assert sum(result["parts"].values()) == pytest.approx(result["nats_per_token"], rel=1e-9)
    first, again = samples
    assert first == again and first[0]["sampler"] == sampler
    assert all(len(s["tokens"]) == 20 and "<mask>" not in s["text"] for s in first)
    assert all(1 <= s["network_evaluations"] <= 20 for s in first)


def look_at(run: Path) -> tuple[dict, list]:
    """Evaluation of a run, and the same samples drawn twice."""
    from pretrain.config.samplers import samplers
    from pretrain.evaluation.run import evaluate_run
    from pretrain.sampling.run import sample_run

    settings = samplers.make("ancestral", steps=8)
    draw = {"num": 2, "length": 20, "prompt": "The", "seed": 3}
    return evaluate_run(run), [sample_run(run, settings, **draw) for _ in range(2)]
