"""Ranks from what launchers put into the environment."""

from __future__ import annotations

import ctypes
import os
from types import SimpleNamespace
from typing import Any

import pytest

from parallel import runtime
from parallel.errors import LayoutError
from parallel.runtime import (
    Environment,
    compute_capability,
    first_host,
    order_kernels,
    read_environment,
)

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


def test_one_rank_of_a_launcher_needs_no_rendezvous() -> None:
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    assert read_environment(alone) == Environment(0, 1, 0, None, None)
    asked = {**alone, "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    assert read_environment(asked) == Environment(0, 1, 0, "a", 1)


def test_a_socket_that_listens_already_is_handed_on() -> None:
    place = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "5"}
    found = read_environment({**place, "MASTER_LISTEN_FD": "7"})
    assert found == Environment(0, 2, 0, "127.0.0.1", 5, listen_fd=7)


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


ORDER = "CUDA_DEVICE_MAX_CONNECTIONS"


@pytest.mark.parametrize(
    ("capability", "before", "after"),
    [(9, None, "1"), (8, None, "1"), (10, None, None), (None, None, None), (9, "16", "16")],
)
def test_gpus_before_blackwell_start_kernels_in_order(
    monkeypatch: pytest.MonkeyPatch, capability: int | None, before: str | None, after: str | None
) -> None:
    monkeypatch.delenv(ORDER, raising=False)
    if before is not None:
        monkeypatch.setenv(ORDER, before)
    order_kernels(capability)
    assert os.environ.get(ORDER) == after
    monkeypatch.delenv(ORDER, raising=False)


def management_library(broken: str = "") -> SimpleNamespace:
    """The driver's, with one GPU of compute capability 9.0; `broken` names a call that fails."""

    def capability(gpu: object, major: Any, minor: Any) -> int:
        major._obj.value, minor._obj.value = 9, 0
        return int(broken == "capability")

    return SimpleNamespace(
        nvmlInit_v2=lambda: int(broken == "init"),
        nvmlDeviceGetHandleByIndex_v2=lambda index, gpu: int(broken == "handle"),
        nvmlDeviceGetCudaComputeCapability=capability,
    )


@pytest.mark.parametrize(
    ("broken", "found"), [("", 9), ("init", None), ("handle", None), ("capability", None)]
)
def test_the_driver_is_asked_for_the_compute_capability(
    monkeypatch: pytest.MonkeyPatch, broken: str, found: int | None
) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: management_library(broken))
    assert compute_capability() == found


def test_without_a_driver_there_is_no_compute_capability(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(runtime.ctypes, "CDLL", missing)
    assert compute_capability() is None
