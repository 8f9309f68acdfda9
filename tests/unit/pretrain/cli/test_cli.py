"""The command line: exit codes, errors in one line or in JSON, and what `train` shows."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import pretrain.cli.main as cli
from data_pipeline.errors import CursorError, ShardError
from parallel.errors import SaveError
from pretrain.cli import doctor
from pretrain.errors import ConfigError

MAIN = "from pretrain.cli.main import main; main()"


def run_cli(
    arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["epochal", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


@pytest.mark.parametrize("error", [ConfigError, ShardError, CursorError, SaveError])
def test_errors_end_with_their_code_in_one_line(
    error: type[Exception], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise error("give a [path] that exists " + "and is long " * 20)

    monkeypatch.setattr("pretrain.config.compose.compose", fail)
    code, out, err = run_cli(["train"], capsys, monkeypatch)
    assert code == error.exit_code  # type: ignore[attr-defined]
    assert out == ""
    assert err.startswith("error: give a [path] that exists")
    assert len(err.splitlines()) == 1
    code, out, err = run_cli(["train", "--json"], capsys, monkeypatch)
    assert json.loads(out)["exit_code"] == code == error.exit_code  # type: ignore[attr-defined]
    assert err == ""


def test_bugs_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise AssertionError("a bug")

    monkeypatch.setattr("pretrain.config.compose.compose", fail)
    monkeypatch.setattr(sys, "argv", ["epochal", "train"])
    with pytest.raises(AssertionError, match="a bug"):
        cli.main()


def test_an_unknown_key_from_the_shell(tmp_path: Path) -> None:
    """The whole way once, as a user meets it."""
    done = subprocess.run(
        [sys.executable, "-c", MAIN, "train", "optimizer.learning_rate=1"],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr == "error: unknown key optimizer.learning_rate; did you mean optimizer.lr?\n"
    assert not list(tmp_path.iterdir()), "a refused command leaves nothing behind"


def test_version(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from pretrain import __version__

    assert run_cli(["--version"], capsys, monkeypatch)[:2] == (0, f"{__version__}\n")


class TestDoctor:
    def test_a_failing_check_is_a_finding_and_the_others_go_on(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def broken() -> None:
            raise RuntimeError("no network")

        broken.__name__ = "check_process_group"
        monkeypatch.setattr(doctor, "check_process_group", broken)
        findings = doctor.examine()
        assert findings[-1] == doctor.Finding("process group", "RuntimeError: no network", "bad")
        assert {"python", "torch", "deepspeed", "cpu", "free disk"} <= {f.what for f in findings}

    def test_a_version_outside_the_tested_range(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(doctor.metadata, "requires", lambda name: ["mlflow>=4", "torch>=2"])
        levels = {f.what: f.level for f in doctor.check_packages()}
        assert levels["mlflow"] == "bad"
        assert levels["torch"] == "ok"

    def test_a_stale_lock_of_an_extension_build(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
        lock = tmp_path / "py311_cpu" / "deepspeed_shm_comm" / "lock"
        lock.parent.mkdir(parents=True)
        lock.touch()
        assert [f.level for f in doctor.check_extension_locks()] == ["ok"]  # a build may be running
        import os

        os.utime(lock, (0, 0))
        (finding,) = doctor.check_extension_locks()
        assert finding.level == "bad"
        assert str(lock) in finding.advice


def test_constraints_satisfy_the_declared_ranges() -> None:
    """Every pin is a version that the distribution accepts, and every dependency has a pin."""
    import tomllib

    root = Path(__file__).resolve().parents[4]
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    lines = (root / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    extras = project["optional-dependencies"]
    declared = [Requirement(text) for text in project["dependencies"] + extras["dev"]]
    ours = [r for r in declared if r.name == project["name"]]  # `epochal[data]` in the dev extra
    inner = [Requirement(text) for r in ours for extra in r.extras for text in extras[extra]]
    for wanted in [r for r in declared if r not in ours] + inner:
        matching = [p for p in pins if canonicalize_name(p.name) == canonicalize_name(wanted.name)]
        assert matching, f"{wanted.name} has no pin in constraints.txt"
        for pin in matching:
            (version,) = (s.version for s in pin.specifier)
            assert wanted.specifier.contains(version), f"{pin} is outside {wanted}"
