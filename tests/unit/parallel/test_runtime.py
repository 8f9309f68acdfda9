"""Ranks from what launchers put into the environment."""

from __future__ import annotations

import pytest

from parallel.errors import LayoutError
from parallel.runtime import Environment, first_host, read_environment

SLURM = {
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_JOB_ID": "123",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NODELIST": "gpu[03-04],big",
}


def test_nothing_set_means_one_rank_without_a_rendezvous() -> None:
    assert read_environment({}) == Environment(0, 1, 0, None, None)


def test_launcher_variables_win_over_slurm() -> None:
    launcher = {
        "RANK": "3",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "host",
        "MASTER_PORT": "29500",
    }
    assert read_environment({**SLURM, **launcher}) == Environment(3, 4, 1, "host", 29500)


def test_a_slurm_step_is_a_launcher() -> None:
    found = read_environment({**SLURM, "SLURM_STEP_NUM_TASKS": "8"})
    assert found == Environment(5, 8, 1, "gpu03", 20000 + 123 * 16 + 2)
    steered = {**SLURM, "SLURM_STEP_NUM_TASKS": "8", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    assert read_environment(steered) == Environment(5, 8, 1, "a", 1)


def test_a_batch_script_outside_srun_is_one_rank() -> None:
    assert read_environment({**SLURM, "SLURM_PROCID": "0"}).world_size == 1


def test_a_half_set_environment_is_refused() -> None:
    with pytest.raises(LayoutError, match="WORLD_SIZE, MASTER_ADDR is not"):
        read_environment({"RANK": "0", "MASTER_PORT": "1"})


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("login", "login"),
        ("a,b", "a"),
        ("gpu[01-04,7],x", "gpu01"),
        ("r1-n[9,11]", "r1-n9"),
        ("n[1-2]-ib,other", "n1-ib"),
    ],
)
def test_first_host_of_a_node_list(nodes, first) -> None:
    assert first_host(nodes) == first
