"""`--dry-run` refuses what ranks would refuse after they were started."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from pretrain.config.compose import compose
from pretrain.config.preflight import preflight
from pretrain.config.run import Config
from pretrain.errors import ConfigError
from pretrain.objectives.masked import Masked
from pretrain.training.rehearsal import rehearse


def config(pool: Path, *overrides: str) -> Config:
    """A configuration that passes preflight."""
    given = [
        f"data.train={pool / 'train' / 'manifest.json'}",
        f"data.validation={pool / 'validation' / 'manifest.json'}",
        f"data.tokenizer={pool / 'tokenizer.model'}",
        "data.seq_length=32",
        "run.device=cpu",
        "tracking=jsonl",
    ]
    return preflight(compose(["model=tiny", *given, *overrides]))


def test_a_run_that_works_passes(pool: Path) -> None:
    rehearse(config(pool, "objective=masked"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ("objective=duo", "objective.curriculum_top_k=100000"),
            r"curriculum_top_k 100000 must be below the \d+ ids",
        ),
        (
            ("model.num_layers=90000", "model.hidden_size=8192", "model.num_attention_heads=64"),
            "parameters, whose training takes .* this machine has",
        ),
    ],
    ids=["vocabulary", "memory"],
)
def test_what_only_the_vocabulary_or_the_machine_shows(
    pool: Path, overrides: tuple[str, ...], message: str
) -> None:
    accepted = config(pool, *overrides)
    with pytest.raises(ConfigError, match=message):
        rehearse(accepted)


def test_an_implementation_that_refuses_its_settings_is_a_user_error(
    pool: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Objectives of other packages may raise anything when they are built."""

    def refuse(self: object, *arguments: object) -> None:
        raise KeyError("sharpness")

    monkeypatch.setattr(Masked, "__init__", refuse)
    with pytest.raises(ConfigError, match=r"masked .*cannot be used with its settings: KeyError"):
        rehearse(config(pool, "objective=masked"))


def test_an_implementation_that_is_not_there_is_a_user_error(pool: Path) -> None:
    from pretrain.config.objectives import objectives

    cls = type(objectives.make("masked"))
    accepted = config(pool, "objective=masked")
    before, cls.implementation = cls.implementation, "pretrain.objectives.masked:Missing"
    try:
        with pytest.raises(ConfigError, match="AttributeError"):
            rehearse(accepted)
    finally:
        cls.implementation = before


def test_results_of_a_run_that_may_only_be_read_are_still_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from pretrain.results import append_results

    append_results(tmp_path / "samples.jsonl", [{"a": 1}])
    assert (tmp_path / "samples.jsonl").read_text() == '{"a": 1}\n'

    def refuse(mode: str) -> None:
        raise OSError(30, "Read-only file system")

    append_results(SimpleNamespace(open=refuse), [{"a": 1}])  # type: ignore[arg-type]
    assert "Read-only file system" in capsys.readouterr().err
