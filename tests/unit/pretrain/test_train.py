"""The entry of every rank: its arguments and its errors."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.rank.orphan import LAUNCHER_PID
from cluster.status import read_first_failure, read_status
from pretrain import train
from pretrain.config.run import Config
from pretrain.errors import TrainingError

DATA = ["data.train=train.json", "data.validation=val.json", "data.tokenizer=sp.model"]


def fail(config: Config) -> int:
    raise TrainingError("the loss is not finite")


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank whose training fails."""
    monkeypatch.setattr(train, "preflight", lambda config, world_size: config)
    monkeypatch.setattr(train, "run", fail)


@pytest.mark.parametrize("argument", ["--local_rank=0", "--local-rank=1"])
def test_the_local_rank_that_launchers_add_is_accepted(
    argument: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main([argument, "optimizer.learning_rate=1"]) == 2
    assert capsys.readouterr().err.startswith("error: unknown key optimizer.learning_rate")


@pytest.mark.usefixtures("failing")
class TestErrors:
    def main(self, run: Path) -> int:
        return train.main(["model=tiny", f"run.dir={run}", *DATA])

    def test_rank_0_states_and_prints_them(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert self.main(tmp_path) == TrainingError.exit_code
        assert capsys.readouterr().err == "error: the loss is not finite\n"
        status = read_status(tmp_path)
        assert status is not None
        assert status["message"] == "TrainingError: the loss is not finite"

    def test_they_are_printed_once_when_epochal_train_watches(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv(LAUNCHER_PID, "1")
        assert self.main(tmp_path) == TrainingError.exit_code
        assert capsys.readouterr().err == ""
        self.main(tmp_path / "gone")  # nobody could read a statement there
        assert capsys.readouterr().err == "error: the loss is not finite\n"

    def test_another_rank_states_them_beside_rank_0(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("RANK", "3")
        assert self.main(tmp_path) == TrainingError.exit_code
        assert capsys.readouterr().err == ""
        assert read_status(tmp_path) is None
        failure = read_first_failure(tmp_path)
        assert failure is not None
        assert failure["message"] == "rank 3: TrainingError: the loss is not finite"
