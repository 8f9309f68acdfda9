"""Checkpoints when things go wrong: full disks, kills, damage, another model."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import signal
import subprocess
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from comparison import same
from harness import Died, run_ranks
from toy_runs import CURSOR, build, dying_at, everything, go, save_and_go_on

from parallel.checkpoint import read_manifest
from parallel.errors import CheckpointError, SaveError


@contextmanager
def small_disk(path: Path, kilobytes: int):
    """A tmpfs of this size; skips where it cannot be mounted."""
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(path)]
    if os.getuid() != 0 or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        yield path
    finally:
        subprocess.run(["umount", str(path)], check=True)


def fill_the_disk(folder: Path, zero: int):
    """Save until the disk is full, train on, free space, save again."""
    from parallel.checkpoint import save_checkpoint

    engine = build(1, zero)
    go(engine, 0, 1)
    save_checkpoint(engine, folder, 1, CURSOR)
    step, message = 1, ""
    while not message and step < 50:
        step += 1
        try:
            save_checkpoint(engine, folder, step, CURSOR)
        except SaveError as error:
            message = str(error)
    torch.distributed.barrier()
    visible = sorted(p.name for p in folder.iterdir())
    torch.distributed.barrier()
    curve = go(engine, 1, 3)
    save_checkpoint_fails = step
    if engine.topology.rank == 0:
        for path in sorted(folder.glob("step-*"))[1:]:
            for file in path.iterdir():
                file.unlink()
            path.rmdir()
    torch.distributed.barrier()
    save_checkpoint(engine, folder, 60, CURSOR)
    return message, visible, save_checkpoint_fails, curve


@pytest.mark.parametrize("zero", [0, 1])
def test_a_full_disk_loses_nothing_and_training_goes_on(tmp_path, zero) -> None:
    with small_disk(tmp_path / "disk", 1024) as disk:
        results = run_ranks(2, fill_the_disk, disk / "run", zero)
        for message, visible, failed_at, _ in results:
            assert "No space left on device" in message
            assert visible == [f"step-{s:08d}" for s in range(1, failed_at)]
        assert results[0][3] == results[1][3]
        for path in (disk / "run").iterdir():
            assert read_manifest(path).step in (1, 60)


def fail_on_the_second_rank(folder: Path) -> tuple[str, list[str], bool]:
    """The second rank may write no file of more than 4 kB."""
    from parallel.checkpoint import load_latest, save_checkpoint

    engine = build(1, 1)
    go(engine, 0, 1)
    save_checkpoint(engine, folder, 1, CURSOR)
    before = everything(engine)
    if engine.topology.rank == 1:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
    go(engine, 1, 2)
    message = ""
    try:
        save_checkpoint(engine, folder, 2, CURSOR)
    except SaveError as error:
        message = str(error)
    visible = sorted(p.name for p in folder.iterdir())
    load_latest(engine, folder)
    return message, visible, same(everything(engine), before)


def test_every_rank_learns_that_another_could_not_write(tmp_path) -> None:
    for message, visible, restored in run_ranks(2, fail_on_the_second_rank, tmp_path):
        assert "rank 1: File too large" in message
        assert visible == ["step-00000001"]
        assert restored


def die_while_saving(folder: Path, call: int) -> None:
    """Save once; then kill all ranks by the `call`-th file operation of the second save."""
    from parallel.checkpoint import folder as files
    from parallel.checkpoint import save, save_checkpoint, writer

    engine = build(1, 1)
    go(engine, 0, 1)
    save_checkpoint(engine, folder, 1, CURSOR)
    go(engine, 1, 2)
    counted = dying_at(call)
    writer.TensorWriter._put = counted(writer.TensorWriter._put)
    save.make_empty = counted(save.make_empty)
    for name in ("write_synced", "sync_folder"):
        setattr(files, name, counted(getattr(files, name)))
    save_checkpoint(engine, folder, 2, CURSOR)
    os._exit(3)


@pytest.mark.parametrize("call", [1, 2, 3, 5, 8, 13, 17, 18, 19, 20])
def test_a_kill_while_saving_leaves_the_previous_checkpoint(tmp_path, call) -> None:
    results = run_ranks(1, die_while_saving, tmp_path, call, may_die=True)
    assert results == [Died(-signal.SIGKILL)], "the kill must hit the second save"
    state, _, _, _ = run_ranks(1, resume_save_again, tmp_path)[0]
    assert state == CURSOR
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000001", "step-00000002"]


def resume_save_again(folder: Path):
    """Resume, and save where the killed run could not."""
    from parallel.checkpoint import load_latest, save_checkpoint

    engine = build(1, 1)
    path, state = load_latest(engine, folder)
    curve = go(engine, read_manifest(path).step, 2)
    save_checkpoint(engine, folder, 2, CURSOR)
    return state, path, curve, None


def load_newest(folder: Path) -> tuple[str, list[str], str]:
    """What load_latest chose, what it said, and what naming the newest says."""
    import logging

    from parallel.checkpoint import load_checkpoint, load_latest

    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("parallel.checkpoint.load").addHandler(handler)
    engine = build(1, 1)
    path, _ = load_latest(engine, folder)
    message = ""
    try:
        load_checkpoint(engine, max(folder.glob("step-*")))
    except CheckpointError as error:
        message = str(error)
    return path.name, said, message


def flip_a_byte(path: Path) -> None:
    file = max(path.glob("optimizer-*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)


def truncate(path: Path) -> None:
    os.truncate(path / "weights.safetensors", 1000)


def lose_manifest(path: Path) -> None:
    (path / "manifest.json").unlink()


def break_manifest(path: Path) -> None:
    os.truncate(path / "manifest.json", 100)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (flip_a_byte, "hash of optimizer-"),
        (truncate, "weights.safetensors has 1,000 bytes"),
        (lose_manifest, "not a complete checkpoint"),
        (break_manifest, "cannot be read"),
    ],
)
def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(tmp_path, damage, words) -> None:
    run_ranks(2, save_and_go_on, tmp_path, 1, 1, (1, 2), 2)
    damage(tmp_path / "step-00000002")
    results = run_ranks(2, load_newest, tmp_path)
    for chosen, _, message in results:
        assert chosen == "step-00000001"
        assert words in message
    assert any(words in line for line in results[0][1])


def garbage_under_its_right_hash(path: Path) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    data = b"garbage" * 100
    (path / "weights.safetensors").write_bytes(data)
    entry = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    manifest["files"]["weights.safetensors"] = entry
    (path / "manifest.json").write_text(json.dumps(manifest))


def wrong_state(path: Path) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, "state": {"position": []}}))


def load_checking_the_state(folder: Path) -> tuple[str, str]:
    """What load_latest chose among three; what it says once the third is gone too."""
    from parallel.checkpoint import load_latest

    def check_state(state: dict) -> None:
        if type(state["position"]) is not int:
            raise ValueError("position: no number")

    engine = build(1, 1)
    path, _ = load_latest(engine, folder, check_state)
    torch.distributed.barrier()
    if engine.topology.rank == 0:
        garbage_under_its_right_hash(path)
    torch.distributed.barrier()
    try:
        load_latest(engine, folder, check_state)
    except CheckpointError as error:
        return path.name, str(error)
    return path.name, ""


def test_wrong_content_under_right_hashes_falls_back_to_a_whole_checkpoint(tmp_path) -> None:
    run_ranks(2, save_and_go_on, tmp_path, 1, 1, (1, 2, 3), 3)
    garbage_under_its_right_hash(tmp_path / "step-00000003")
    wrong_state(tmp_path / "step-00000002")
    for chosen, message in run_ranks(2, load_checking_the_state, tmp_path):
        assert chosen == "step-00000001"
        assert "none of the 3 checkpoints" in message


def test_a_checkpoint_of_another_model_is_refused(tmp_path) -> None:
    run_ranks(1, save_and_go_on, tmp_path, 1, 0, (1,), 1)
    assert "another model: it lacks ['extra.weight']" in run_ranks(1, load_wrong_names, tmp_path)[0]


def load_wrong_names(folder: Path) -> str:
    from parallel.checkpoint import load_latest

    engine = build(1, 0)
    engine.shapes["extra.weight"] = [3]
    try:
        load_latest(engine, folder)
    except CheckpointError as error:
        return str(error)
    return ""


def save_many(folder: Path) -> list[str]:
    from parallel.checkpoint import save_checkpoint

    engine = build(1, 0)
    names = []
    for step in (1, 2, 9, 10, 10):
        save_checkpoint(engine, folder, step, {"step": step, "try": len(names)}, keep=2)
        names.append(" ".join(sorted(p.name for p in folder.iterdir())))
    return names


def test_old_checkpoints_are_pruned_and_a_step_can_be_saved_again(tmp_path) -> None:
    names = run_ranks(1, save_many, tmp_path)[0]
    assert names[1] == "step-00000001 step-00000002"
    assert names[2] == "step-00000002 step-00000009"
    assert names[4] == "step-00000009 step-00000010"
    assert read_manifest(tmp_path / "step-00000010").state == {"step": 10, "try": 4}
