"""Starting and stopping: without a launcher, without compiling anything, with megatron on CPU."""

from __future__ import annotations

import os
import platform
import resource
import socket
from pathlib import Path

import pytest
from harness import run_ranks

from parallel.errors import LayoutError


def train_alone(extensions: Path) -> tuple[int, float, list[str], list[str]]:
    """A whole life of one rank: start, train, stop; launcher variables that it left behind."""
    os.environ["TORCH_EXTENSIONS_DIR"] = str(extensions)
    import toy

    from parallel.layout.topology import Topology
    from parallel.runtime import init_distributed, shutdown

    runtime = init_distributed(timeout_minutes=1)
    assert init_distributed(timeout_minutes=1) == runtime
    engine = toy.toy_engine(Topology.build(zero_stage=1), 1)
    loss = float(toy.toy_step(engine, 0).loss)
    shutdown()
    shutdown()
    left = [name for name in ("RANK", "WORLD_SIZE", "MASTER_PORT") if name in os.environ]
    return runtime.world_size, loss, left, sorted(p.name for p in extensions.iterdir())


def test_one_rank_needs_no_launcher_and_nothing_is_compiled(tmp_path) -> None:
    # DeepSpeed would build deepspeed_shm_comm when it starts, and its CPUAdam: minutes each.
    ((world_size, loss, left, built),) = run_ranks(1, train_alone, tmp_path, launcher=False)
    assert world_size == 1
    assert loss > 0
    assert left == []
    assert built == []


def listen_as_the_local_launcher_does() -> list[str]:
    """Addresses on which this process listens once its group and a second one work."""
    import psutil
    import torch
    import torch.distributed as dist

    from parallel.runtime import init_distributed

    with socket.create_server(("127.0.0.1", 0)) as meeting:
        os.environ |= {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(meeting.getsockname()[1]),
            "MASTER_LISTEN_FD": str(os.dup(meeting.fileno())),
            "RANK": "0",
            "WORLD_SIZE": "1",
        }
        init_distributed(timeout_minutes=1)
    dist.all_reduce(torch.ones(1), group=dist.new_group([0]))
    found = psutil.Process().net_connections()
    return sorted({c.laddr.ip for c in found if c.status == psutil.CONN_LISTEN})


def test_a_run_on_one_machine_listens_on_loopback_alone() -> None:
    assert run_ranks(1, listen_as_the_local_launcher_does, launcher=False) == [["127.0.0.1"]]


def two_lives() -> list[float]:
    """Start, train and stop twice in one process."""
    import toy

    from parallel.layout.topology import Topology
    from parallel.runtime import init_distributed, shutdown

    losses = []
    for _ in range(2):
        init_distributed(timeout_minutes=1)
        engine = toy.toy_engine(Topology.build(zero_stage=0), 0)
        losses.append(float(toy.toy_step(engine, 0).loss))
        shutdown()
    return losses


def test_a_process_can_start_again_after_shutdown() -> None:
    ((first, second),) = run_ranks(1, two_lives, launcher=False)
    assert first == second


def touch_repeatedly(user: dict[str, str]) -> list[int]:
    """Fresh pages that each of eight tensors of 64 MiB takes, one after the other."""
    os.environ.update(user)
    import torch

    from parallel.runtime import init_distributed

    init_distributed(device="cpu")
    faults = []
    for _ in range(8):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(16 << 20)
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return faults


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator only")
@pytest.mark.parametrize("kept", [True, False])
def test_memory_of_a_step_is_kept_for_the_next_unless_the_user_says_otherwise(kept: bool) -> None:
    user = {} if kept else {"MALLOC_ARENA_MAX": "8"}
    ((first, *_, last),) = run_ranks(1, touch_repeatedly, user, launcher=False)
    pages = (64 << 20) // resource.getpagesize()
    assert first > pages / 2
    assert last < pages / 100 if kept else last > pages / 2


def gather_on_cpu() -> list[float]:
    """megatron's gather asks for torch.cuda.current_device()."""
    import torch

    from parallel.layout.topology import Topology
    from parallel.runtime import init_distributed

    init_distributed(timeout_minutes=1)
    topology = Topology.build(tensor_parallel_size=2)
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    own = torch.tensor([[float(topology.tp_rank)]])
    return gather_from_tensor_model_parallel_region(own)[0].tolist()


def test_megatron_gathers_on_machines_without_cuda() -> None:
    assert run_ranks(2, gather_on_cpu) == [[0.0, 1.0], [0.0, 1.0]]


def refuse() -> list[str]:
    """Messages of illegal requests, and whether any group was built for them."""
    import toy
    from megatron.core import parallel_state

    from parallel.layout.topology import Topology
    from parallel.runtime import init_distributed

    init_distributed(timeout_minutes=1)
    messages = []
    for wrong in ({"tensor_parallel_size": 3}, {"precision": "bfloat16", "zero_stage": 0}):
        with pytest.raises(LayoutError) as caught:
            Topology.build(**wrong)
        messages.append(str(caught.value))
        assert not parallel_state.model_parallel_is_initialized()
    topology = Topology.build()
    with pytest.raises(LayoutError) as caught:
        toy.toy_engine(topology, 0, precision="bfloat16")
    return [*messages, str(caught.value)]


def test_illegal_layouts_are_refused_before_any_group_exists() -> None:
    for degrees, topology, engine in run_ranks(2, refuse):
        assert "does not divide the 2 ranks" in degrees
        assert "bfloat16 needs parallel.zero_stage 1" in topology
        assert "bfloat16 needs parallel.zero_stage 1" in engine
