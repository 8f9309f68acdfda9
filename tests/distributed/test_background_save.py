"""Saving in the background: training goes on, and nothing that dies or fails loses more
than the checkpoint in flight."""

from __future__ import annotations

import json
import os
import resource
import signal
import threading
from pathlib import Path

import pytest
import runs
import torch.distributed as dist
from comparison import same
from harness import Died, run_ranks
from toy_runs import CURSOR, build, dying_at, everything, go

from parallel.checkpoint import BackgroundSaver, background, read_manifest
from parallel.checkpoint import folder as files
from parallel.checkpoint.writer import TensorWriter
from parallel.errors import SaveError


def hold_writers() -> threading.Event:
    """Writers wait until the event is set."""
    released, original = threading.Event(), TensorWriter.append

    def append(self, name, tensor):
        released.wait()
        original(self, name, tensor)

    TensorWriter.append = append
    return released


def train_behind_a_slow_disk(folder: Path, zero: int):
    """Save in the background with a disk that stands still, train on, let it go on."""
    from parallel.checkpoint import load_latest

    engine, saver = build(1, zero, ema_decay=0.9), BackgroundSaver()
    go(engine, 0, 2)
    saved = everything(engine)
    state = {"cursor": dict(CURSOR)}
    released = hold_writers()
    saver.save(engine, folder, 2, state)
    state["cursor"]["position"] = -1  # the caller's dict goes on changing
    go(engine, 2, 5)
    unfinished = sorted(p.name for p in folder.iterdir())
    released.set()
    path = saver.finish()
    assert saver.finish() is None
    later = everything(engine)
    _, loaded = load_latest(engine, folder)
    return unfinished, path.name, loaded, same(everything(engine), saved), same(later, saved)


@pytest.mark.parametrize("zero", [0, 1])
def test_steps_go_on_and_the_checkpoint_is_that_of_its_step(tmp_path, zero) -> None:
    for unfinished, name, state, restored, stood in run_ranks(
        2, train_behind_a_slow_disk, tmp_path, zero
    ):
        assert unfinished == [".tmp-step-00000002"]
        assert name == "step-00000002"
        assert state == {"cursor": CURSOR}
        assert restored
        assert not stood
    content = sorted(p.name for p in (tmp_path / "step-00000002").iterdir())
    assert content == [
        "ema.safetensors",
        "manifest.json",
        "optimizer-00000.safetensors",
        "optimizer-00001.safetensors",
        "weights.safetensors",
    ]


def save_four_times(folder: Path, blind: bool):
    """Back to back, keeping two; `blind`: rank 0 never sees a mark of another rank."""
    if blind:
        background.POLL_SECONDS = 3600.0
    engine, saver, said = build(1, 1), BackgroundSaver(), []
    for step in range(1, 5):
        go(engine, step - 1, step)
        saver.save(engine, folder, step, {"step": step}, keep=2)
        if not blind and step == 2:
            saver._pending.thread.join()
            said.append(saver.committed())
            said.append(saver.committed())
        saver.finish()
    return said, everything(engine)


@pytest.mark.parametrize("blind", [False, True])
def test_saves_follow_each_other_and_old_ones_go(tmp_path, blind) -> None:
    results = run_ranks(2, save_four_times, tmp_path, blind)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000003", "step-00000004"]
    assert read_manifest(tmp_path / "step-00000004").state == {"step": 4}
    if not blind:
        assert results[0][0] == [tmp_path / "step-00000002", None]


def die_in_flight(folder: Path, call: int) -> None:
    """Save; then, training on, die by the `call`-th file operation of a background save."""
    engine, saver = build(1, 1), BackgroundSaver()
    go(engine, 0, 1)
    saver.save(engine, folder, 1, CURSOR)
    saver.finish()
    go(engine, 1, 2)
    counted = dying_at(call)
    TensorWriter._put = counted(TensorWriter._put)
    TensorWriter.close = counted(TensorWriter.close)
    for name in ("write_synced", "sync_folder"):
        setattr(files, name, counted(getattr(files, name)))
    saver.save(engine, folder, 2, CURSOR)
    go(engine, 2, 4)
    saver.finish()
    os._exit(3)


def resume(folder: Path):
    """Load what is there, and save where the killed run could not."""
    from parallel.checkpoint import load_latest, save_checkpoint

    engine = build(1, 1)
    path, state = load_latest(engine, folder)
    go(engine, read_manifest(path).step, 2)
    save_checkpoint(engine, folder, 2, CURSOR)
    return path.name, state


@pytest.mark.parametrize("call", [1, 2, 4, 8, 14, 17, 18, 22, 23, 24])
def test_a_kill_in_flight_leaves_the_previous_checkpoint(tmp_path, call) -> None:
    died = run_ranks(1, die_in_flight, tmp_path, call, may_die=True)
    assert died == [Died(-signal.SIGKILL)], "the kill must hit the save in flight"
    assert run_ranks(1, resume, tmp_path) == [("step-00000001", CURSOR)]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000001", "step-00000002"]


def fail_in_flight(folder: Path):
    """The second rank's disk is full during one save in the background, then it is not."""
    engine, saver = build(1, 1), BackgroundSaver()
    go(engine, 0, 1)
    saver.save(engine, folder, 1, CURSOR)
    saver.finish()
    if engine.topology.rank == 1:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
    saver.save(engine, folder, 2, CURSOR)
    curve = go(engine, 1, 3)
    message = ""
    try:
        saver.finish()
    except SaveError as error:
        message = str(error)
    visible = sorted(p.name for p in folder.iterdir())
    dist.barrier()  # or a quick rank begins the next save before this one has looked
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    saver.save(engine, folder, 3, CURSOR)
    saver.finish()
    return message, visible, curve


def test_a_full_disk_in_flight_is_raised_on_every_rank_and_the_next_save_works(tmp_path) -> None:
    for message, visible, _ in run_ranks(2, fail_in_flight, tmp_path):
        assert "step 2 could not be written" in message
        assert "rank 1: File too large" in message
        assert visible == ["step-00000001"]
    assert read_manifest(tmp_path / "step-00000003").step == 3


def train_on_a_slow_disk(pool: Path, run: Path, fail: bool) -> int:
    """The train loop: a signal comes while the checkpoint of step 4 is in flight, or it fails."""
    from pretrain import train
    from pretrain.training import hooks

    released, original = hold_writers(), hooks.Hooks.after_step
    if fail:
        full = OSError(28, "No space left on device")

        def append(self, name, tensor):
            raise full

        held, TensorWriter.append = TensorWriter.append, append
        released.set()

    def after_step(self, *arguments):
        step = self.session.state.step
        if step == 6:
            assert self.session.saver._pending is not None
            if fail:
                TensorWriter.append = held
            else:
                os.kill(os.getpid(), signal.SIGTERM)
                threading.Timer(0.5, released.set).start()
        original(self, *arguments)

    hooks.Hooks.after_step = after_step
    return train.main(runs.overrides(pool, run, "objective=masked"))


def test_preemption_waits_for_the_checkpoint_in_flight(pool: Path, tmp_path: Path) -> None:
    assert run_ranks(2, train_on_a_slow_disk, pool, tmp_path, False) == [75, 75]
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "preempted"
    made = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert made == ["step-00000004", "step-00000006"]
    assert [read_manifest(tmp_path / "checkpoints" / name).step for name in made] == [4, 6]


def test_a_checkpoint_that_fails_in_flight_does_not_stop_the_run(pool, tmp_path) -> None:
    assert run_ranks(2, train_on_a_slow_disk, pool, tmp_path, True) == [0, 0]
    made = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert made == ["step-00000008", "step-00000012", "step-00000015"]
