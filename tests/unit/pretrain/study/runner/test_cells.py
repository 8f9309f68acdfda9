"""Study files and the cells of their grids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pretrain.config.compose import compose
from pretrain.errors import ConfigError
from pretrain.study.runner.cells import cells_of, override_text, recipe
from pretrain.study.runner.settings import (
    find_study,
    make_study,
    packaged_studies,
    read_study,
)

PLAIN: dict[str, Any] = {"name": "s", "learning_rate": "one for all"}


def study(**values: Any) -> Any:
    return make_study({**PLAIN, **values}, "s.yaml")


def test_cells_are_the_cross_product_of_the_axes_and_those_of_each_recipe() -> None:
    made = study(
        base=["data.seq_length=64"],
        arms={
            "AR default": {"set": ["objective=autoregressive"], "grid": {"data.epochs": [20]}},
            "AR tuned": {
                "like": "AR default",
                "set": ["optimizer.weight_decay=1.6"],
                "grid": {"data.epochs": [8, 16], "data.unique_tokens": [50]},
            },
        },
        grid={"data.unique_tokens": [25, 50], "run.seed": [1, 2]},
    )
    cells = cells_of(made)
    assert [cell.name for cell in cells] == [
        *(
            f"AR-default,unique_tokens={u},seed={seed},epochs=20"
            for u in (25, 50)
            for seed in (1, 2)
        ),
        *(
            f"AR-tuned,unique_tokens=50,seed={seed},epochs={epochs}"
            for seed in (1, 2)
            for epochs in (8, 16)
        ),
    ]
    assert cells[-1].configuration == "AR-tuned,unique_tokens=50,epochs=16"
    assert cells[-1].arm == "AR tuned"
    assert cells[-1].overrides == (
        "data.seq_length=64",
        "objective=autoregressive",  # inherited before its own
        "optimizer.weight_decay=1.6",
        "data.unique_tokens=50",
        "run.seed=2",
        "data.epochs=16",
    )


def test_cells_with_all_the_given_values_are_left_out() -> None:
    grid = {"model": ["7m", "14m"], "data.unique_tokens": [25, 50]}
    left = cells_of(study(grid=grid, exclude=[{"model": "14m", "data.unique_tokens": "2.5e1"}]))
    assert [cell.name for cell in left] == [
        "model=7m,unique_tokens=25",
        "model=7m,unique_tokens=50",
        "model=14m,unique_tokens=50",
    ]
    left = cells_of(study(grid=grid, exclude=[{"data.unique_tokens": [25, 50], "model": "7m"}]))
    assert [cell.axes["model"] for cell in left] == ["14m", "14m"]


def test_without_recipes_an_arm_is_the_family_and_what_is_neither_size_data_nor_seed() -> None:
    grid = {"objective": ["masked"], "optimizer.weight_decay": [0.1], "model": ["tiny"]}
    (cell,) = cells_of(study(grid=grid | {"run.seed": [1], "data.epochs": [2]}))
    assert recipe(cell, "masked") == "masked, weight_decay=0.1"


def test_values_of_a_study_file_reach_the_configuration_as_they_are() -> None:
    values = {
        "optimizer.lr": "1e-3",  # a text for YAML
        "train.eval_epochs": [1, 2.5],
        "data.unique_tokens": 1000,
        "optimizer.schedule.warmup": 0.05,
        "model.qk_norm": True,
        "tracking.experiment": 'two words, "quoted"',
        "train.micro_batch_size": None,
    }
    config = compose([f"{key}={override_text(value)}" for key, value in values.items()])
    assert config.optimizer.lr == 1e-3
    assert config.train.eval_epochs == (1, 2.5)
    assert config.data.unique_tokens == 1000
    assert config.optimizer.schedule.warmup == 0.05
    assert config.model.qk_norm is True
    assert config.tracking.experiment == 'two words, "quoted"'
    assert config.train.micro_batch_size is None


def test_names_are_safe_short_and_tell_keys_of_the_same_ending_apart() -> None:
    (cell,) = cells_of(study(grid={"a.size": ["x/../y z"], "b.size": [1]}))
    assert cell.name == "a.size=x-..-y-z,b.size=1"
    (cell,) = cells_of(study(grid={"data.train": ["p" * 300]}))
    assert len(cell.name) == 150


REFUSED = [
    ({"nmae": "x"}, ["s.yaml: unknown key nmae; did you mean name?"]),
    ({"learning_rate": "guessed"}, ["learning_rate.rule", "tuned per size"]),
    ({"grid": {"run.seed": []}}, ["grid.run.seed", "a list of values"]),
    ({"grid": {"run.seed": 3}}, ["grid.run.seed", "given 3"]),
    ({"grid": {"run.seed": [1, 2, 1]}}, ["1 stands twice"]),
    ({"arms": {"a": {"like": "b"}, "bb": {}}}, ["arms.a.like", "did you mean 'bb'?"]),
    ({"arms": {"a": {"like": "b"}, "b": {"like": "a"}}}, ["a -> b -> a is a circle"]),
    ({"arms": {"a": {"set": ["run.seed=1"]}}, "grid": {"run.seed": [1]}}, ["also an axis"]),
    ({"arms": {"a": {"sets": []}}}, ["unknown key arms.a.sets"]),
    ({"arms": {"AR": {}}, "compare": {"reference": "ARR"}}, ["did you mean 'AR'?"]),
    ({"flops": ["1e18"], "grid": {"data.epochs": [1]}}, ["follows from flops"]),
    ({"flops": ["many"]}, ["numbers such as 1e18"]),
    ({"flops": [-1]}, ["numbers above 0"]),
    ({"stopping": {"patience": -1}}, ["stopping.patience"]),
    ({"name": "../s"}, ["makes a folder"]),
    ({"parallel_runs": 0}, ["parallel_runs"]),
]


@pytest.mark.parametrize(("values", "said"), REFUSED, ids=[str(v) for v, _ in REFUSED])
def test_mistakes_in_a_study_file_name_their_place(values: dict[str, Any], said: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        study(**values)
    for words in said:
        assert words in str(error.value)
    assert str(error.value).startswith("s.yaml: ")


BAD_CELLS = [
    ({"base": ["run.name=x"]}, "a study sets run.name for each run"),
    ({"grid": {"train.patience": [1]}}, "use stopping:"),
    ({"grid": {"run.seed": [1]}, "exclude": [{"run.sed": 1}]}, "did you mean run.seed?"),
    ({"grid": {"run.seed": [1]}, "exclude": [{"run.seed": 2}]}, "no run has"),
    ({"grid": {"run.seed": [1]}, "exclude": [{}]}, "no run has"),
    ({"grid": {"run.seed": [1]}, "exclude": [{"run.seed": 1}]}, "has no runs"),
    ({"arms": {"a b": {}, "a-b": {}}}, "two runs would be called a-b"),
]


@pytest.mark.parametrize(("values", "said"), BAD_CELLS, ids=[said for _, said in BAD_CELLS])
def test_grids_that_cannot_be_meant_are_refused(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        cells_of(study(**values))


def test_packaged_studies_are_read_by_name_and_a_misspelt_one_is_suggested() -> None:
    assert "smoke" in packaged_studies()
    for name in packaged_studies():
        assert cells_of(read_study(find_study(name)))
    with pytest.raises(ConfigError, match="did you mean smoke"):
        find_study("smok")


def test_overrides_of_the_command_line_come_last(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_text("name: s\nlearning_rate: {rule: transferred, note: CompleteP}\nbase: [a=1]\n")
    read = read_study(path, ["a=2"])
    assert read.base == ("a=1", "a=2")
    assert read.learning_rate.note == "CompleteP"
