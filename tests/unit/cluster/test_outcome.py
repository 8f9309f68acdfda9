"""The outcome of a run: statements of ranks against exit codes."""

from __future__ import annotations

import json
from typing import Any

import pytest

from cluster.errors import LaunchError
from cluster.outcome import Ended, judge

DIED = LaunchError.exit_code


def said(state: str, code: int, message: str = "", step: int = 5) -> dict[str, Any]:
    """Rank 0's statement."""
    return {"state": state, "step": step, "message": message, "exit_code": code}


def test_the_ranks_statement_wins_over_exit_codes() -> None:
    assert judge(said("finished", 0), Ended("the launcher", 241)).exit_code == 0
    assert judge(said("failed", 5, "disk full"), Ended("rank 0", 0)).exit_code == 5
    assert judge(said("failed", 5, "disk full"), Ended("rank 0", -9)).message == "disk full"


@pytest.mark.parametrize("code", [0, 1, -9, 5])
def test_a_run_that_died_has_failed_whatever_the_code(code: int) -> None:
    outcome = judge(said("running", 1, step=1234), Ended("rank 0", code))
    assert (outcome.state, outcome.exit_code) == ("failed", DIED)
    assert "1,234" in outcome.message


def test_a_killed_rank_is_named_although_the_others_only_saw_a_lost_connection() -> None:
    lost = said("failed", 1, "connection closed")
    outcome = judge(lost, Ended("rank 3", -9))
    assert outcome.exit_code == DIED
    assert outcome.message.startswith("rank 3 was killed by SIGKILL")
    assert judge(lost, Ended("rank 3", 1)).exit_code == 1


def test_another_ranks_own_error_explains_a_lost_connection() -> None:
    failure = {"message": "rank 1: disk full", "exit_code": 5}
    outcome = judge(said("failed", 1, "connection closed"), Ended("rank 1", 5), failure)
    assert (outcome.message, outcome.exit_code) == ("rank 1: disk full", 5)
    # The same error on all ranks is reported by rank 0.
    outcome = judge(said("failed", 5, "disk full"), Ended("rank 1", 5), failure)
    assert outcome.message == "disk full"


def test_errors_before_training_keep_their_code() -> None:
    assert judge(None, Ended("rank 0", 4)).exit_code == 4


def test_a_stop_before_training_loses_nothing() -> None:
    for status in (None, said("running", 1)):
        assert judge(status, Ended("rank 0", -15, stopped_by="SIGTERM")).exit_code == 75
    assert judge(said("running", 1), Ended("rank 0", -9, stopped_by="SIGTERM")).exit_code == DIED
    assert judge(None, Ended("rank 0", -9, killed=True)).exit_code == DIED


def test_a_signal_without_a_name() -> None:
    assert str(Ended("rank 0", -63)) in ("rank 0 was killed by 63", "rank 0 was killed by SIGRTMAX")


def test_an_outcome_is_plain_json() -> None:
    assert json.dumps(judge(None, Ended("rank 0", 0)).to_dict())
