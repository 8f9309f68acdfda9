"""The tidy table of a study, from what its runs have left in their folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from cluster.status import write_status
from pretrain.errors import ConfigError
from pretrain.study.runner.collect import collect, write_table
from pretrain.study.runner.planned import Facts
from pretrain.study.runner.state import read_progress
from pretrain.study.table import COLUMNS


def facts(name: str, **values: Any) -> dict[str, Any]:
    plain = Facts(
        run=name,
        configuration="c",
        arm="AR",
        family="autoregressive",
        seed=1,
        axes={"data.epochs": 4.0, "model": "7m", "flops": 1e9, "train.eval_epochs": [1, 2]},
        params=1000,
        params_non_embedding=400,
        unique_tokens=100,
        planned_epochs=4.0,
        total_steps=8,
        last_step=8,
        tokens=400,
        ranks=1,
    )
    return plain.to_dict() | values


def evaluation(step: int, loss: float, **more: float) -> dict[str, float]:
    return {
        "step": step,
        "time": 1.0 * step,
        "train/tokens": 50.0 * step,
        "train/flops": 7e3 * step,
        "validation/nats_per_token": loss,
        "validation/bits_per_byte": loss / 2,
        "validation/standard_error": 0.1,
        **more,
    }


def write(folder: Path, rows: dict[str, list[dict[str, float]]]) -> None:
    for name, lines in rows.items():
        (folder / "runs" / name).mkdir(parents=True)
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / "runs" / name / "metrics.jsonl").write_text(text)
    runs = [facts("b", family="masked"), facts("a", axes={"run.seed": 1}), facts("c")]
    record = {"name": "s", "tracking": None, "runs": runs}
    (folder / "study.json").write_text(json.dumps(record))


def test_a_row_for_each_evaluation_sorted_by_run_and_step(tmp_path: Path) -> None:
    exact = {"validation/noise_error": 0.0}
    write(
        tmp_path,
        {
            "b": [evaluation(8, 4.5), {"step": 4, "time": 1.0, "train/loss": 1.0}],
            "a": [
                evaluation(8, 4.0, **exact),
                evaluation(4, 5.0, **exact),
                evaluation(8, 4.25, **exact),  # measured again after an interruption
            ],
            "removed": [evaluation(8, 1.0)],
        },
    )
    table = collect(tmp_path)
    axes = ["data.epochs", "model", "flops_budget", "train.eval_epochs", "run.seed"]
    assert list(table.columns) == [*COLUMNS, *axes]
    assert list(zip(table["run"], table["step"], table["loss"], strict=True)) == [
        ("a", 4, 5.0),
        ("a", 8, 4.25),
        ("b", 8, 4.5),
    ]
    first, last = table.iloc[0], table.iloc[2]
    assert (first["tokens"], first["epochs"], first["final"]) == (200, 2.0, False)
    assert (first["flops"], first["flops_6nd"]) == (28e3, 6.0 * 1000 * 200)
    assert (first["likelihood"], first["noise_error"]) == ("exact", 0.0)
    assert last["final"]
    assert last["likelihood"] == "bound"
    assert pd.isna(last["noise_error"])
    assert (last["model"], last["flops_budget"]) == ("7m", 1e9)
    assert pd.isna(first["model"])


def test_both_files_hold_the_table_and_are_always_the_same(tmp_path: Path) -> None:
    write(tmp_path, {"a": [evaluation(4, 1 / 3)], "b": [evaluation(4, 2.0)]})
    table = collect(tmp_path)
    csv, parquet = write_table(table, tmp_path / "table")
    contents = csv.read_bytes(), parquet.read_bytes()
    pd.testing.assert_frame_equal(pd.read_parquet(parquet), table)
    assert pd.read_csv(csv)["loss"].tolist() == [1 / 3, 2.0]  # every digit
    write_table(collect(tmp_path), tmp_path / "table")
    assert (csv.read_bytes(), parquet.read_bytes()) == contents


def test_a_study_without_measurements_is_an_empty_table(tmp_path: Path) -> None:
    write(tmp_path, {})
    assert collect(tmp_path).empty
    with pytest.raises(ConfigError, match="has no MLflow"):
        collect(tmp_path, "mlflow")


@pytest.mark.parametrize(
    ("stated", "message", "expected"),
    [
        (None, "", "waiting"),
        ("finished", "", "finished"),
        ("finished", "stopped by train.patience", "stopped"),
        ("preempted", "", "interrupted"),
        ("running", "", "interrupted"),  # nobody holds the folder: it was killed
        ("failed", "loss nan", "failed"),
    ],
)
def test_the_state_of_a_run_is_what_its_folder_says(
    tmp_path: Path, stated: Any, message: str, expected: str
) -> None:
    (tmp_path / "metrics.jsonl").write_text(
        json.dumps({"step": 3, "train/loss": 2.5}) + "\n" + json.dumps(evaluation(3, 3.5))[:-5]
    )
    if stated is not None:
        write_status(tmp_path, stated, step=3, message=message, exit_code=0)
    progress = read_progress(tmp_path)
    assert progress.state == expected
    assert (progress.loss, progress.validation) == (2.5, None)
