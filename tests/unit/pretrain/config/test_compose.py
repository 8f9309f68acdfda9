"""Composition: what comes out repeats the run, what is misspelt is answered with what was meant."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from pretrain.config import compose as module
from pretrain.config.compose import compose, flatten, load_config, replace_values, save_config
from pretrain.config.groups import groups
from pretrain.config.run import Config
from pretrain.config.suggest import closest
from pretrain.errors import ConfigError

DATA = [
    "data.train=pool/train.json",
    "data.validation=pool/val.json",
    "data.tokenizer=pool/sp.model",
]


def refusal(*overrides: str, file: Path | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        compose([*overrides], file)
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_values_win_over_groups_whatever_their_order() -> None:
    config = compose(["model.num_layers=3", "model=tiny", *DATA])
    assert (config.model.num_layers, config.model.hidden_size) == (3, 128)


def test_every_option_of_every_group_composes() -> None:
    for group, options in groups().items():
        for option in options:
            assert isinstance(compose([f"{group}={option}", *DATA]), Config)


def test_every_key_of_the_tree_can_be_set_although_no_file_names_it() -> None:
    config = compose(["parallel.timeout_minutes=3", "model.rope_base=5e5", *DATA])
    assert config.parallel.timeout_minutes == 3
    assert config.model.rope_base == 5e5


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("optimizer.learning_rate", "optimizer.lr"),
        ("optimizer.schedule.nam", "optimizer.schedule.name"),
        ("train.batch_size", "train.global_batch_size"),
        ("model.n_layers", "model.num_layers"),
        ("data.seq_len", "data.seq_length"),
        ("tp", "parallel.tensor_parallel_size"),
        ("parallel.zero", "parallel.zero_stage"),
        ("seed", "run.seed"),
        ("weight_decay", "optimizer.weight_decay"),
    ],
)
def test_an_unknown_key_is_answered_with_the_one_meant(given: str, meant: str) -> None:
    assert refusal(f"{given}=1", *DATA) == f"unknown key {given}; did you mean {meant}?"


def test_a_stranger_gets_no_suggestion() -> None:
    assert closest("qqqqq.xxxx", module.known_keys()) is None
    assert "did you mean" not in refusal("qqqqq.xxxx=1", *DATA)


def test_an_unknown_option_lists_the_known_ones() -> None:
    message = refusal("model=tinny", *DATA)
    assert "did you mean tiny?" in message
    assert all(option in message for option in groups()["model"])


def test_every_bad_value_is_one_line_with_path_given_and_allowed() -> None:
    lines = refusal(
        "optimizer.lr=-1", "train.precision=fp16", "data.seq_length=abc", *DATA
    ).splitlines()
    assert len(lines) == 3
    assert "optimizer.lr: given -1, allowed: greater than 0" in lines
    assert "train.precision: given 'fp16', allowed: 'float32' or 'bfloat16'" in lines
    assert any(line.startswith("data.seq_length: given 'abc'") for line in lines)


def test_cross_field_checks_speak_plainly() -> None:
    message = refusal("model=tiny", "parallel.tensor_parallel_size=3", *DATA)
    assert "tensor_parallel_size 3 does not divide" in message
    assert "pydantic" not in message


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optimizer.lr=inf", ["optimizer.lr", "finite"]),
        ("data.epochs=inf", ["data.epochs", "finite"]),
        ("data.epochs=1e30", ["data.epochs", "1000000"]),
        ("optimizer.betas=[0.9,1]", ["optimizer.betas.1", "less than 1"]),
        ("optimizer.betas=0.9", ["optimizer.betas", "a list"]),
        ("train.eval_epochs=[-1]", ["train.eval_epochs.0", "-1"]),
        ("data.order=window(0)", ["data.order", "window(W) with W >= 1"]),
        ("data.order=shuffled", ["data.order", "'shuffled'", "sequential"]),
        ("model.num_layers=1e30", ["model.num_layers", "at most 18 digits"]),
        ("model.num_layers=100001", ["model.num_layers", "100000"]),
        (f"model.hidden_size={10**30}", ["model.hidden_size", "16777216"]),
        (f"train.global_batch_size={10**30}", ["train.global_batch_size", str(2**62)]),
        (f"data.seq_length={10**30}", ["data.seq_length", str(2**62)]),
        ("run.name=", ["run.name", "below run.root"]),
        ("run.name=../elsewhere", ["run.name", "'../elsewhere'"]),
        ("tracking.uri=htp://host", ["tracking.uri", "'htp://host'", "http://..."]),
    ],
)
def test_values_that_could_not_train_are_refused_by_name(override: str, words: list[str]) -> None:
    message = refusal(*DATA, override)
    assert all(word in message for word in words), message
    assert "\n" not in message


def test_an_order_is_written_as_the_documents_do() -> None:
    """Hydra takes parentheses for a call of a function; they belong to our word."""
    assert compose(["data.order=window(8)", *DATA]).data.order == "window(8)"
    assert compose(['data.order="window(8)"', *DATA]).data.order == "window(8)"


def test_a_run_folder_in_place_of_its_configuration_is_answered_with_the_file(
    tmp_path: Path,
) -> None:
    assert str(tmp_path / "config.yaml") in refusal(file=tmp_path)


@pytest.mark.parametrize(
    "override",
    ["optimizer.lr=1,2", "a b=c", "model.num_layers=[1", "~model.num_layers", "run.name=${nope}",
     "optimizer.schedule=wsd", "model=null", "=", "model", "optimizer.lr.x=1", "data.train=null"],
)  # fmt: skip
def test_unusable_overrides_are_errors_and_never_tracebacks(override: str) -> None:
    assert refusal(*DATA, override)


@pytest.mark.parametrize(
    "text", ["- a\n- b\n", "model: [", "model: {num_layers: 2}\nnonsense: 1\n", "\x00", "x", ""]
)
def test_unusable_files_are_errors_and_never_tracebacks(tmp_path: Path, text: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(text)
    assert refusal(file=file)
    assert refusal(file=tmp_path / "missing.yaml")
    assert refusal(file=tmp_path)


def test_a_saved_configuration_gives_itself_back_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = compose(["model=tiny", "optimizer.lr=0.0012345678901234567", "run.name=a b", *DATA])
    path = config.run.path / "config.yaml"
    save_config(config, path)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert load_config(path) == config
    assert config.data.train == tmp_path / "pool" / "train.json"
    changed = compose(["train.stop_step=7"], path)
    assert changed == replace_values(config, {"train.stop_step": 7})
    assert {k for k, v in flatten(changed).items() if v != flatten(config)[k]} == {
        "train.stop_step"
    }


def test_groups_cannot_be_chosen_over_a_saved_configuration(tmp_path: Path) -> None:
    save_config(compose(DATA), tmp_path / "config.yaml")
    assert "model.num_layers=4" in refusal("model=tiny", file=tmp_path / "config.yaml")


def test_a_failed_save_keeps_the_earlier_file(tmp_path: Path) -> None:
    path = tmp_path / "run" / "config.yaml"
    save_config(compose(["model=tiny", *DATA]), path)
    before = path.read_bytes()
    os.mkdir(tmp_path / "run" / f".config.yaml.{os.getpid()}")  # the partial file cannot be made
    with pytest.raises(ConfigError, match=r"cannot write .*config\.yaml"):
        save_config(compose(["model=small", *DATA]), path)
    assert path.read_bytes() == before


def test_composition_works_from_an_installed_copy_and_imports_nothing_heavy(tmp_path: Path) -> None:
    """Copies of the packages as a wheel lays them out, without the checkout on the path."""
    root = Path(module.__file__).parents[2]
    site = tmp_path / "site-packages"
    site.mkdir()
    for package in ("pretrain", "parallel", "data_pipeline", "configs"):
        subprocess.run(["cp", "-r", root / package, site / package], check=True)
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import pretrain.config.compose as c\n"
        "assert c.__file__.startswith(sys.argv[1]), c.__file__\n"
        "print(c.compose(['model=tiny', *sys.argv[2:]]).model.num_layers)\n"
        "assert not {'torch', 'deepspeed', 'mlflow', 'pandas'} & set(sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", code, str(site), *DATA],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == "4", done.stderr


def documented_commands() -> list[str]:
    root = Path(__file__).resolve().parents[4]
    files = [root / "README.md", *sorted((root / "docs").glob("*.md"))]
    texts = [file.read_text().replace("\\\n", " ") for file in files]  # continued lines joined
    lines = [line for text in texts for line in text.splitlines()]
    return [line.strip() for line in lines if line.strip().startswith("epochal train ")]


@pytest.mark.parametrize("command", documented_commands())
def test_commands_in_the_documents_compose(command: str) -> None:
    words = shlex.split(command, comments=True)[2:]
    overrides = [word for word in words if "=" in word and not word.startswith("-")]
    if "--config" not in words:
        assert compose([*overrides, *DATA])
