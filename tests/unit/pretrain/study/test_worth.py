"""`epochal study worth`: losses, run folders and studies against published and own baselines."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
from typer.testing import CliRunner

from pretrain.cli.main import app
from pretrain.errors import ConfigError
from pretrain.study.table import COLUMNS


def run(*arguments: object) -> dict:
    found = CliRunner().invoke(app, ["study", "worth", *map(str, arguments), "--json"])
    assert found.exit_code == 0, found.output
    return json.loads(found.stdout)


def row(arm: str, unique: float, epochs: float, loss: float, **other: object) -> dict:
    name = f"{arm}-{unique:g}-{epochs:g}"
    given = {
        **dict.fromkeys(COLUMNS, 1.0),
        "study": "s", "run": name, "configuration": name, "arm": arm, "family": "autoregressive",
        "likelihood": "exact", "seed": 0, "unique_tokens": unique, "tokens": unique * epochs,
        "epochs": epochs, "planned_epochs": epochs, "final": True, "loss": loss,
        "noise_error": 0.0,
    }  # fmt: skip
    return given | other


ROWS = [
    row("plain", 1e6, 1, 5.0),
    row("plain", 1e7, 1, 4.0),
    row("plain", 1e8, 1, 3.0),
    row("plain", 1e6, 10, 4.5),
    row("masked", 1e6, 50, 4.0, family="masked", likelihood="bound", noise_error=0.05),
]


def write_study(folder: Path, rows: list[dict]) -> Path:
    folder.mkdir()
    pd.DataFrame(rows).to_csv(folder / "table.csv", index=False)
    return folder


@pytest.fixture
def study(tmp_path: Path) -> Path:
    return write_study(tmp_path / "study", ROWS)


def test_a_loss_by_the_published_table() -> None:
    """12.9 times at 3.001 nats, as the repository of NanoGPT Slowrun states."""
    found = run("--loss", 3.001, "--baseline", "slowrun")
    (result,) = found["results"]
    assert result["ratio"] == pytest.approx(12.9, abs=0.05)
    assert result["tokens"] == pytest.approx(1e9 + 1e9 * 0.045 / 0.154)
    assert result["relation"] == "equal"
    assert "github.com/qlabs-eng/slowrun" in result["baseline"]
    assert "cannot be compared" in found["warnings"][0]
    (other,) = run("--loss", 3.001, "--baseline", "slowrun", "--unique-tokens", "10M")["results"]
    assert other["ratio"] == pytest.approx(129, abs=0.5)


def test_the_error_of_a_loss_makes_its_interval() -> None:
    (found,) = run("--loss", 3.1615, "--error", 0.01, "--baseline", "slowrun")["results"]
    per_nat = 2e8 / (3.2 - 3.123)
    assert found["high"] - found["low"] == pytest.approx(2 * 1.645 * 0.01 * per_nat, rel=0.05)


@pytest.mark.parametrize(
    ("loss", "relation", "tokens"), [(2.5, "more than", 2e9), (4.5, "less than", 2e8)]
)
def test_nothing_is_extrapolated(loss: float, relation: str, tokens: float) -> None:
    (found,) = run("--loss", loss, "--baseline", "slowrun")["results"]
    assert (found["relation"], found["tokens"]) == (relation, tokens)
    text = (
        CliRunner()
        .invoke(app, ["study", "worth", "--loss", str(loss), "--baseline", "slowrun"])
        .stdout
    )
    assert relation in text
    assert "FineWeb" in text


def test_arms_of_a_study_by_their_own_runs_of_one_epoch(study: Path) -> None:
    found = run(study, "--arm", "plain")
    values = {(r["label"], r["unique_tokens"]): r for r in found["results"]}
    assert values["plain", 1e6]["tokens"] == pytest.approx(10**6.5)
    assert values["plain", 1e6]["ratio"] == pytest.approx(10**0.5)
    assert values["plain", 1e8]["ratio"] == pytest.approx(1)
    masked = values["masked", 1e6]
    assert masked["tokens"] == pytest.approx(1e7)
    assert masked["low"] < 1e7 < masked["high"]
    assert "bound" in found["warnings"][1]
    # One arm alone has such runs, so that its name need not be given.
    assert run(study) == found


def test_the_best_evaluation_of_a_run(study: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text("data: {unique_tokens: 1000000}\n")
    losses = [{"step": i, "validation/nats_per_token": x} for i, x in enumerate((5, 3.5, 4.0))]
    lines = [json.dumps(line | {"validation/noise_error": 0.0}) for line in losses]
    (folder / "metrics.jsonl").write_text("\n".join([*lines, ""]))
    (found,) = run(folder, "--baseline", study)["results"]
    assert found["label"] == "run"
    assert found["tokens"] == pytest.approx(10**7.5)
    assert found["ratio"] == pytest.approx(10**1.5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "either a folder"),
        (["STUDY", "--loss", "3"], "either a folder"),
        (["--loss", "3"], "give --baseline"),
        (["--loss", "nan", "--baseline", "slowrun"], "finite"),
        (["--loss", "3", "--baseline", "nowhere"], "is no folder"),
        (["--loss", "3", "--baseline", "EMPTY"], "neither a study"),
        (["--loss", "3", "--baseline", "REPEATED"], "no finished run of one epoch"),
        (["EMPTY", "--baseline", "slowrun"], "neither a run"),
        (["STUDY", "--error", "0.1"], "--error is that of --loss"),
        (["STUDY", "--arm", "other"], "of one epoch of plain"),
        (["--loss", "3", "--baseline", "TWO"], "choose an arm"),
        (["--loss", "3", "--baseline", "slowrun", "--arm", "a"], "has no arms"),
        (["--loss", "3", "--baseline", "slowrun", "--unique-tokens", "0"], "positive"),
    ],
)
def test_user_errors(study: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    (tmp_path / "EMPTY").mkdir()
    write_study(tmp_path / "REPEATED", [row("plain", 1e6, 10, 4.5)])
    write_study(tmp_path / "TWO", [*ROWS, row("other", 1e7, 1, 4.2)])
    places = {"STUDY": study} | {n: tmp_path / n for n in ("EMPTY", "REPEATED", "TWO")}
    words = [str(places.get(word, word)) for word in arguments]
    found = CliRunner().invoke(app, ["study", "worth", *words])
    assert isinstance(found.exception, ConfigError)
    assert message in str(found.exception)
