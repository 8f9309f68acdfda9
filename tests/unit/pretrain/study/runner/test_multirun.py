"""Sweeps of `epochal train --multirun` become studies."""

from __future__ import annotations

from pathlib import Path

import pytest

from pretrain.config.groups import groups
from pretrain.errors import ConfigError
from pretrain.study.runner.cells import cells_of
from pretrain.study.runner.multirun import multirun_study


def test_values_separated_by_commas_are_axes_and_everything_else_is_the_base() -> None:
    words = ["model=tiny", "objective=autoregressive,masked", "optimizer.lr=1e-3,3e-3"]
    study, folder = multirun_study([*words, "data.order=window(8)", "train.eval_epochs=[1,2]"])
    assert study.base == ("model=tiny", "data.order=window(8)", "train.eval_epochs=[1,2]")
    assert study.grid == {"objective": ("autoregressive", "masked"), "optimizer.lr": (1e-3, 3e-3)}
    assert folder == Path("runs/multirun")
    assert [cell.name for cell in cells_of(study)] == [
        "objective=autoregressive,lr=0.001",
        "objective=autoregressive,lr=0.003",
        "objective=masked,lr=0.001",
        "objective=masked,lr=0.003",
    ]


def test_all_forms_of_a_sweep_are_understood() -> None:
    words = [
        "run.seed=range(1,4)",
        "data.unique_tokens=choice(100,200)",
        "model=glob(1*)",
        "data.order=window(8),global",
        "train.eval_epochs=[1],[1,2]",
        "train.micro_batch_size=null,2",
    ]
    grid = multirun_study(words)[0].grid
    assert grid == {
        "run.seed": (1, 2, 3),
        "data.unique_tokens": (100, 200),
        "model": tuple(name for name in groups()["model"] if name.startswith("1")),
        "data.order": ("window(8)", "global"),
        "train.eval_epochs": ([1], [1, 2]),
        "train.micro_batch_size": (None, 2),
    }


def test_root_and_name_choose_the_folder() -> None:
    study, folder = multirun_study(["run.root=/data/x", "run.name=rates", "optimizer.lr=1,2"])
    assert (study.name, folder, study.base) == ("rates", Path("/data/x/rates"), ())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["model=tiny"], "needs a key with several values"),
        (["optimizer.lr=interval(0,1)"], "an interval has no list of values"),
        (["run.seed=glob(*)"], r"run\.seed is none"),
        (["model=glob(zz*)"], "fits none of 1.7b"),
        (["run.seed=1,2", "run.seed=3,4"], "swept twice"),
        (["run.seed=1,1"], "stands twice"),
        (["run.name=a,b"], "a study sets run.name"),
    ],
)
def test_other_sweeps_are_refused(words: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        cells_of(multirun_study(words)[0])
