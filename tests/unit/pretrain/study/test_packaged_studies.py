"""Packaged study files: every run composes, and there are as many as the papers trained."""

from __future__ import annotations

import math
from functools import cache

import pytest

from pretrain.config.compose import compose
from pretrain.config.run import Config
from pretrain.model.size import parameter_count
from pretrain.study.runner.cells import FLOPS, Cell, cells_of
from pretrain.study.runner.settings import find_study, packaged_studies, read_study

GPT2, SEQUENCES = 50_257, 256
RUNS = {
    "attention_dropout": 5,
    "contour": 13 * 22 - 6 - 7,
    "crossover": 288,
    "data_value": 6 * 5 + 2 * 2,
    "epoch_protocols": 6,
    "input_masking": 8,
    "isoflop_families": 4 * 30 - 2,
    "learning_rate_sweep": 4 * 3 * 6,
    "left_to_right_share": 5,
    "simple_loss": 2 * 3 * 7,
    "token_orders": 10,
}
SMALL = ("model=2m", "data.seq_length=64", "data.unique_tokens=64000", "parallel=single")
ABLATIONS = (
    "attention_dropout",
    "epoch_protocols",
    "input_masking",
    "left_to_right_share",
    "token_orders",
)


@cache
def runs(name: str, *overrides: str) -> list[tuple[Cell, Config]]:
    cells = cells_of(read_study(find_study(name), overrides))
    return [(cell, compose([*cell.overrides])) for cell in cells]


def parameters(config: Config) -> int:
    return parameter_count(config.model, config.model.padded_vocab_size(GPT2))


@pytest.mark.parametrize("name", RUNS)
def test_every_run_of_a_packaged_study_composes(name: str) -> None:
    """A unique name for each, one statement about rates, a batch that its ranks can split."""
    found = runs(name)
    assert len(found) == RUNS[name]
    assert len({cell.name for cell, _ in found}) == len(found)
    for cell, config in found:
        assert config.train.global_batch_size == SEQUENCES
        assert config.num_microbatches >= 1
        assert (FLOPS in cell.axes) == (name in ("data_value", "isoflop_families", "simple_loss"))
    study = read_study(find_study(name))
    assert study.learning_rate.note
    assert study.description


def test_every_packaged_study_is_checked_here() -> None:
    apart = {"smoke", "crossover_cpu", "crossover_cpu_tuning"}
    assert {*packaged_studies()} - apart == {*RUNS}


@pytest.mark.parametrize("name", ABLATIONS)
def test_an_ablation_runs_small_by_words_of_the_command_line(name: str) -> None:
    """`epochal study run NAME model=2m ...`: they come after the study's."""
    for _, config in runs(name, *SMALL):
        assert config.model.hidden_size == 192
        assert config.data.unique_tokens == 64_000
        assert config.world_size == 1


def test_the_contour_has_the_best_cells_of_the_paper() -> None:
    """Its lowest losses are at 144.8 M x 50 epochs and 416.9 M x 500 epochs: 4.3e18 and 1.25e20."""
    flops = {
        (cell.arm, cell.axes["model"], cell.axes["data.epochs"]): 6
        * parameters(config)
        * config.data.epochs
        * (config.data.unique_tokens or 0)
        for cell, config in runs("contour")
    }
    assert flops["AR", "chinchilla_140m", 50] == pytest.approx(4.34e18, rel=0.01)
    assert flops["masked", "chinchilla_425m", 500] == pytest.approx(1.25e20, rel=0.01)


def test_the_value_of_data_is_measured_at_the_papers_epochs() -> None:
    """C / (6 N U) is 1, 2, 4, 10, 20 within the rounding of the printed numbers of tokens."""
    for cell, config in runs("data_value"):
        assert cell.arm is not None
        assert float(cell.arm.split()[1]) == cell.axes[FLOPS]
        epochs = cell.axes[FLOPS] / (6 * parameters(config) * (config.data.unique_tokens or 0))
        nearest = min((1, 2, 4, 10, 20, 50, 100), key=lambda e: abs(math.log(epochs / e)))
        assert epochs == pytest.approx(nearest, rel=0.015), cell.name


def test_tuned_autoregression_has_the_published_settings() -> None:
    """Each size has the rate and the decay of arXiv 2606.06888, and its neighbour."""
    best = {"chinchilla_74m": (1e-2, 0.4), "chinchilla_140m": (3e-3, 0.8),
            "chinchilla_278m": (1e-3, 1.6), "chinchilla_632m": (1e-3, 1.6)}  # fmt: skip
    tuned = [(c, config) for c, config in runs("crossover") if c.arm == "AR tuned"]
    for model, (lr, decay) in best.items():
        decays = {config.optimizer.weight_decay for c, config in tuned if c.axes["model"] == model}
        assert decay in decays
        assert len(decays) == 2
        rates = {config.optimizer.lr for c, config in tuned if c.axes["model"] == model}
        assert rates == {lr}


def test_isoflop_budgets_have_seven_sizes_at_most_and_five_at_least() -> None:
    counts: dict[tuple[str | None, float], int] = {}
    for cell, _ in runs("isoflop_families"):
        key = cell.arm, cell.axes[FLOPS]
        counts[key] = counts.get(key, 0) + 1
    assert len(counts) == 20
    assert all(5 <= count <= 7 for count in counts.values())
