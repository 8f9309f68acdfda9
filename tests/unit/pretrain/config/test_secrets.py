"""A password in an address reaches no file, log or tracker; earlier runs with one go on."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import yaml
from forging import RUN, forge_checkpoint
from safetensors import safe_open
from typer.testing import CliRunner

from parallel.checkpoint import read_manifest
from pretrain.checkpoints import export_checkpoint, reshard
from pretrain.config import secrets
from pretrain.config.compose import compose, flatten, load_config, save_config
from pretrain.errors import ConfigError
from pretrain.training.start import write_run

DATA = ["model=tiny", "run.name=r"] + [
    f"data.{key}=/x/{file}"
    for key, file in {
        "train": "train.json", "validation": "validation.json", "tokenizer": "t.model",
    }.items()
]  # fmt: skip
SECRET = "hunter2"
CARRIERS = {
    "http": f"https://me:{SECRET}@host:5000/path",
    "token": f"https://{SECRET}@host",
    "database": f"postgresql://me:{SECRET}@host/db",
    "driver": f"mysql+pymysql://me:{SECRET}@host/db?charset=utf8",
    "query": f"postgresql://me@host/db?sslpassword={SECRET}",
    "at sign": f"http://me:a@{SECRET}@host",
}
NAMES = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "PGPASSWORD")


@pytest.mark.parametrize("uri", CARRIERS.values(), ids=CARRIERS.keys())
def test_an_address_with_a_password_is_refused_with_the_remedy(uri: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose([*DATA, f"tracking.uri='{uri}'"])
    message = str(caught.value)
    assert message.startswith("tracking.uri: ")
    assert "MLFLOW_TRACKING_PASSWORD" in message
    assert ".netrc" in message
    assert SECRET not in message
    assert SECRET not in secrets.redacted(f"cannot reach {uri}: refused")


def test_other_settings_are_looked_at_too() -> None:
    for override in (
        f"data.train='https://me:{SECRET}@host/manifest.json'",
        f"data.train='https://host/manifest.json?X-Amz-Signature={SECRET}'",
        f"data.validation='https://host/m.json?sv=1&sig={SECRET}'",
        f"+tracking.trackers=[{{name: mlflow, uri: 'http://a:{SECRET}@h'}}]",
    ):
        with pytest.raises(ConfigError) as caught:
            compose([*DATA, override])
        assert SECRET not in str(caught.value)


def test_addresses_without_a_password_are_allowed() -> None:
    for uri in (
        "http://host:5000", "sqlite:////tmp/a@b.db", "postgresql://me@host/db", "databricks",
        "https://host/a@b", "databricks://profile",
    ):  # fmt: skip
        assert compose([*DATA, f"tracking.uri='{uri}'"]).tracking.uri == uri
        assert secrets.redacted(f"see {uri}, or write to me@host") == (
            f"see {uri}, or write to me@host"
        )


def test_the_command_line_does_not_repeat_it(capsys: pytest.CaptureFixture[str]) -> None:
    from pretrain.cli.main import app

    uri = CARRIERS["http"]
    for arguments in (
        ["train", *DATA, "--tracking-uri", uri],
        ["train", *DATA, f"tracking.uri={uri}", "--dry-run"],
        ["train", *DATA, f"tracking.uri=htp{uri[5:]}"],
    ):
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code != 0
        assert SECRET not in result.output
        from pretrain.cli.output import print_error

        print_error(ConfigError(str(result.exception)), 2)
        assert SECRET not in capsys.readouterr().err


@pytest.fixture
def earlier_run(tmp_path: Path) -> Path:
    """A run folder whose configuration an earlier version wrote with a password in it."""
    config = compose([*DATA, f"run.root={tmp_path}", "tracking.uri=http://host:5000/path"])
    path = config.run.path / "config.yaml"
    save_config(config, path)
    path.write_text(path.read_text().replace("http://host", f"http://m%40e:{SECRET}%21@host"))
    return path


def test_an_earlier_run_goes_on_and_loses_its_password(
    earlier_run: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in NAMES:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    with caplog.at_level(logging.WARNING):
        config = load_config(earlier_run)
    import os

    assert config.tracking.uri == "http://host:5000/path"
    assert os.environ["MLFLOW_TRACKING_USERNAME"] == "m@e"
    assert os.environ["MLFLOW_TRACKING_PASSWORD"] == f"{SECRET}!"
    assert "change the password" in caplog.text
    assert SECRET not in caplog.text
    assert not any(secrets.holds_secret(str(value)) for value in flatten(config).values())
    write_run(config)
    written = [p.read_text() for p in earlier_run.parent.glob("*.yaml")]
    assert len(written) == 2
    assert not any(SECRET in text for text in written)
    assert yaml.safe_load(earlier_run.read_text())["tracking"]["uri"] == "http://host:5000/path"


def test_the_users_own_credentials_come_first(
    earlier_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "other")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "word")
    load_config(earlier_run)
    assert os.environ["MLFLOW_TRACKING_PASSWORD"] == "word"


def test_exports_and_copies_of_earlier_checkpoints_hold_none(tmp_path: Path) -> None:
    def change(content: dict) -> None:
        content["state"]["config"]["tracking.uri"] = CARRIERS["http"]

    path = forge_checkpoint(tmp_path, change)
    export_checkpoint(path, tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert SECRET not in json.dumps(metadata)
    assert json.loads(metadata["config"])["tracking.uri"] == "https://***@host:5000/path"
    made = Path(reshard(path, tmp_path / "copy")["written"])
    assert SECRET not in (made / "manifest.json").read_text()
    before = read_manifest(RUN / "checkpoints" / "step-00000008").state
    kept = read_manifest(made).state
    assert kept["cursor"] == before["cursor"]
    assert kept["train"] == before["train"]
