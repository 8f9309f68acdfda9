"""Ranks on this machine: what they are given, who is signalled, blamed and left behind."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
from stage import Stage, is_running, wait_for

from cluster.errors import ClusterError, FolderInUseError, LaunchError
from cluster.folder import exclusive, starting
from cluster.status import read_status

DIED = LaunchError.exit_code


def test_a_finished_run(stage: Stage) -> None:
    code, out = stage.end(stage.start("finish"))
    assert code == 0, out
    assert out.startswith("2 ranks: ")
    assert f"-m stand_in {stage.run}" in out
    for rank in (0, 1):  # their lines may run into each other
        assert f"rank {rank} has finished" in out
    wait_for(lambda: not any(map(is_running, stage.pids(kind="child"))), "the children's end")


def test_every_rank_is_given_its_place(stage: Stage) -> None:
    assert stage.end(stage.start("meet"))[0] == 0
    for rank in (0, 1):
        place = stage.place(rank)
        assert (place["RANK"], place["LOCAL_RANK"], place["WORLD_SIZE"]) == (
            *(str(rank), str(rank), "2"),
        )
        assert place["MASTER_ADDR"] == "127.0.0.1"


def test_one_rank_meets_nobody_whatever_the_environment_says(stage: Stage) -> None:
    """Variables of a launcher further up would make it wait for ranks that do not exist."""
    above = {"RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "elsewhere", "MASTER_PORT": "1"}
    assert stage.end(stage.start("finish", ranks=1, **above))[0] == 0
    assert stage.place(0) == {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}


def test_runs_that_start_at_the_same_time_do_not_meet_each_other(stage: Stage) -> None:
    stages = [replace(stage, name=f"run-{number}") for number in range(4)]
    fronts = [each.start("meet") for each in stages]
    for each, front in zip(stages, fronts, strict=True):
        assert each.end(front)[0] == 0
        assert (each.run / "met").read_text() == str(each.run)


def test_exit_code_zero_without_a_statement_is_a_failure(stage: Stage) -> None:
    code, out = stage.end(stage.start("silent"))
    assert code == DIED, out
    assert "without a statement" in stage.outcome()["message"]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_is_named_and_takes_the_others_along(stage: Stage, rank: int) -> None:
    front = stage.start(f"die {rank} SIGKILL")
    pids = stage.pids() + stage.pids(kind="child")
    code, out = stage.end(front)
    assert code == DIED, out
    assert f"rank {rank} was killed by SIGKILL (often: out of memory)" in stage.outcome()["message"]
    wait_for(lambda: not any(map(is_running, pids)), "the end of the ranks and their children")


def test_another_signal_is_named_too(stage: Stage) -> None:
    assert stage.end(stage.start("die 1 SIGSEGV"))[0] == DIED
    assert "rank 1 was killed by SIGSEGV;" in stage.outcome()["message"]


@pytest.mark.parametrize("others", ["hang", "lost"])
def test_the_rank_that_failed_first_is_believed(stage: Stage, others: str) -> None:
    """Not those that wait for it for ever, nor those that lost their connection to it."""
    code, out = stage.end(stage.start(f"fail 1 {others}"))
    assert code == 3, out
    assert stage.outcome()["message"] == "rank 1: ValueError: shard 3 is damaged"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_reaches_the_ranks_as_sigterm(stage: Stage, number: signal.Signals) -> None:
    front = stage.start("train")
    pids = stage.pids()
    front.send_signal(number)
    code, out = stage.end(front)
    assert code == 75, out
    assert [(stage.run / f"signal-{r}").read_text() for r in range(2)] == ["SIGTERM", "SIGTERM"]
    assert not any(map(is_running, pids))


def test_a_signal_before_the_ranks_listen_loses_nothing(stage: Stage) -> None:
    front = stage.start("deaf")
    stage.pids()
    front.terminate()
    assert stage.end(front)[0] == 75
    assert "nothing had to be saved" in stage.outcome()["message"]
    status = read_status(stage.run)  # although no rank stated anything
    assert status == {"state": "preempted", "step": 0, "exit_code": 75} | {
        "message": stage.outcome()["message"]
    }


def test_a_second_signal_kills_what_does_not_listen(stage: Stage) -> None:
    front = stage.start("stubborn")
    pids = stage.pids() + stage.pids(kind="child")
    front.send_signal(signal.SIGINT)
    assert front.stdout is not None
    assert any(line.startswith("SIGINT: the ranks save and stop") for line in front.stdout)
    assert all(map(is_running, pids))
    front.send_signal(signal.SIGINT)
    assert stage.end(front)[0] == DIED
    assert "a second signal killed the ranks" in stage.outcome()["message"]
    wait_for(lambda: not any(map(is_running, pids)), "the ranks' end")


def test_ranks_of_a_killed_front_process_save_and_end(stage: Stage) -> None:
    front = stage.start("train")
    pids = stage.pids()
    front.kill()  # stays a zombie until it is waited for
    wait_for(lambda: not any(map(is_running, pids)), "the ranks' end")
    assert [(stage.run / f"signal-{r}").read_text() for r in range(2)] == ["SIGTERM", "SIGTERM"]


def is_free(run: Path) -> bool:
    """True when nobody trains in the folder."""
    try:
        with exclusive(run):
            return True
    except ClusterError:
        return False


def test_ranks_keep_the_run_folder_when_the_front_process_was_killed(stage: Stage) -> None:
    front = stage.start("stubborn")
    pids = stage.pids()
    message = f"in use by process {pids[0]} on "  # rank 0, whoever started it
    with pytest.raises(FolderInUseError, match=message), exclusive(stage.run):
        pass
    with pytest.raises(FolderInUseError, match=f"in use by process {front.pid} on "):
        starting(stage.run).__enter__()
    front.kill()
    front.wait()
    with pytest.raises(FolderInUseError, match=message):
        starting(stage.run).__enter__()
    for pid in pids + stage.pids(kind="child"):
        os.kill(pid, signal.SIGKILL)
    wait_for(lambda: is_free(stage.run), "the folder's release")


def test_an_unwritable_place_for_runs(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(ClusterError, match="cannot use the run folder"),
        exclusive(tmp_path / "file" / "run"),
    ):
        pass
