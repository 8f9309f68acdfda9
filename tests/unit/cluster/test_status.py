"""Statements of ranks in the run folder."""

from __future__ import annotations

from pathlib import Path

from cluster.status import (
    forget_statements,
    read_first_failure,
    read_status,
    write_failure,
    write_first_failure,
    write_status,
)


class DamagedError(Exception):
    exit_code = 3


def test_a_failure_keeps_the_step_of_the_statement_before(tmp_path: Path) -> None:
    write_status(tmp_path, "running", step=40, exit_code=1)
    write_failure(tmp_path, DamagedError("shard 3"))
    assert read_status(tmp_path) == {
        "state": "failed",
        "step": 40,
        "message": "DamagedError: shard 3",
        "exit_code": 3,
    }


def test_only_the_first_failure_of_other_ranks_is_kept(tmp_path: Path) -> None:
    write_first_failure(tmp_path, 2, DamagedError("shard 3"))
    write_first_failure(tmp_path, 1, RuntimeError("connection closed"))
    assert read_first_failure(tmp_path) == {
        "message": "rank 2: DamagedError: shard 3",
        "exit_code": 3,
    }


def test_statements_of_an_earlier_attempt_can_be_forgotten(tmp_path: Path) -> None:
    forget_statements(tmp_path)
    write_status(tmp_path, "finished", step=1, exit_code=0)
    write_first_failure(tmp_path, 1, RuntimeError("x"))
    forget_statements(tmp_path)
    assert read_status(tmp_path) is None
    assert read_first_failure(tmp_path) is None


def test_a_folder_that_is_gone_is_no_second_error(tmp_path: Path) -> None:
    write_first_failure(tmp_path / "gone", 1, RuntimeError("x"))
