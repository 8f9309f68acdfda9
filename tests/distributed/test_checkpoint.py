"""Checkpoints on real ranks: exact resume, other layouts, full disks, kills and damage."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import Died, run_ranks

from parallel.checkpoint import latest_checkpoint, load_weights, read_manifest
from parallel.errors import CheckpointError, SaveError

CURSOR = {"position": 24, "seed": 17, "tiny": 0.1 + 0.2}


def build(tp: int, zero_stage: int, **changes: Any):
    """A toy engine on the ranks of this call."""
    import toy

    from parallel.runtime import init_distributed
    from parallel.topology import Topology

    init_distributed(timeout_minutes=1)
    topology = Topology.build(tensor_parallel_size=tp, zero_stage=zero_stage, timeout_minutes=1)
    return toy.toy_engine(topology, zero_stage, **changes)


def everything(engine) -> dict[str, torch.Tensor]:
    """Whole weights and moments."""
    kinds = ("weight", "exp_avg", "exp_avg_sq") if engine.optimizer_step else ("weight",)
    return {
        f"{kind}/{n}": engine.read(n, kind).clone() for n in engine.parameters for kind in kinds
    }


def go(engine, start: int, stop: int) -> list[tuple[float, float]]:
    """Train; loss and gradient norm of every step."""
    import toy

    results = [toy.toy_step(engine, step) for step in range(start, stop)]
    return [(float(r.loss), float(r.grad_norm)) for r in results]


def save_and_go_on(folder: Path, tp: int, zero: int, saves: tuple[int, ...], stop: int, **changes):
    """Train to `stop`, saving on the way; the curve, and all tensors at the first save and end."""
    from parallel.checkpoint import save_checkpoint

    engine = build(tp, zero, **changes)
    curve, done, at_save = [], 0, {}
    for step in saves:
        curve += go(engine, done, step)
        done = step
        save_checkpoint(engine, folder, step, CURSOR)
        at_save = at_save or everything(engine)
    curve += go(engine, done, stop)
    return curve, at_save, everything(engine)


def resume_and_go_on(folder: Path, tp: int, zero: int, stop: int, **changes):
    """Load the newest checkpoint into a fresh engine and train to `stop`."""
    from parallel.checkpoint import load_latest

    engine = build(tp, zero, **changes)
    go(engine, 50, 51)  # what a fresh engine has done before must leave no trace
    path, state = load_latest(engine, folder)
    restored = everything(engine)
    start = read_manifest(path).step
    return state, restored, go(engine, start, stop), everything(engine)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize(
    ("ranks", "tp", "zero", "precision"),
    [
        (1, 1, 0, "float32"),
        (1, 1, 1, "float32"),
        (2, 1, 0, "float32"),
        (2, 1, 1, "float32"),
        (2, 1, 2, "float32"),
        (2, 2, 0, "float32"),
        (2, 2, 1, "float32"),
        (2, 1, 1, "bfloat16"),
        (2, 1, 2, "bfloat16"),
    ],
)
def test_resume_in_the_same_layout_is_bitwise_also_after_two_interruptions(
    tmp_path, ranks, tp, zero, precision
) -> None:
    whole = run_ranks(ranks, save_and_go_on, tmp_path, tp, zero, (2,), 6, precision=precision)
    curve, at_save, end = whole[0]
    second = run_ranks(ranks, resume_save_and_go_on, tmp_path, tp, zero, 4, precision=precision)
    third = run_ranks(ranks, resume_and_go_on, tmp_path, tp, zero, 6, precision=precision)
    state, _, rest, again = third[0]
    assert state == CURSOR
    assert same(second[0][0], at_save)
    assert second[0][1] + rest == curve[2:]
    assert same(again, end)
    assert json.loads((tmp_path / "step-00000004" / "manifest.json").read_text())["step"] == 4


def resume_save_and_go_on(folder: Path, tp: int, zero: int, stop: int, **changes):
    """Load, train to `stop`, save there."""
    from parallel.checkpoint import load_latest, save_checkpoint

    engine = build(tp, zero, **changes)
    path, _ = load_latest(engine, folder)
    restored = everything(engine)
    curve = go(engine, read_manifest(path).step, stop)
    save_checkpoint(engine, folder, stop, CURSOR)
    return restored, curve


LAYOUTS = {
    "1 rank, stage 0": (1, 1, 0),
    "1 rank, stage 1": (1, 1, 1),
    "dp2, stage 0": (2, 1, 0),
    "dp2, stage 1": (2, 1, 1),
    "dp2, stage 2": (2, 1, 2),
    "tp2, stage 0": (2, 2, 0),
    "tp2, stage 2": (2, 2, 2),
    "tp2 x dp2, stage 1": (4, 2, 1),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Checkpoints at step 3 under every layout, each with the tensors and the curve to step 6."""
    made = {}
    for name, (ranks, tp, zero) in LAYOUTS.items():
        folder = tmp_path_factory.mktemp("saved")
        made[name] = folder, run_ranks(ranks, save_and_go_on, folder, tp, zero, (3,), 6)[0]
    return made


@pytest.mark.parametrize("source", LAYOUTS)
def test_any_layout_resumes_what_any_other_saved(saved, source) -> None:
    folder, (curve, at_save, _) = saved[source]
    targets = [name for name in LAYOUTS if name != source]
    # Every source meets three targets, and every target three sources.
    index = list(LAYOUTS).index(source)
    for target in [targets[(index + k) % len(targets)] for k in (0, 2, 5)]:
        ranks, tp, zero = LAYOUTS[target]
        state, restored, rest, _ = run_ranks(ranks, resume_and_go_on, folder, tp, zero, 6)[0]
        assert state == CURSOR, target
        assert same(restored, at_save), f"{source} -> {target}"
        for (loss, norm), (want_loss, want_norm) in zip(rest, curve[3:], strict=True):
            assert loss == pytest.approx(want_loss, rel=1e-5), f"{source} -> {target}"
            assert norm == pytest.approx(want_norm, rel=1e-5), f"{source} -> {target}"


def resume_as_bfloat16(folder: Path):
    from parallel.checkpoint import load_latest

    engine = build(1, 1, precision="bfloat16")
    load_latest(engine, folder)
    live = {n: p.detach().clone() for n, p in engine.parameters.items()}
    return everything(engine), live


def test_precision_may_change_and_the_float32_weights_stay(saved) -> None:
    folder, (_, at_save, _) = saved["dp2, stage 0"]
    restored, live = run_ranks(2, resume_as_bfloat16, folder)[0]
    assert same(restored, at_save)
    for name, weight in live.items():
        assert weight.dtype == torch.bfloat16
        assert torch.equal(weight, at_save[f"weight/{name}"].bfloat16())


def test_weights_are_readable_without_an_engine(saved) -> None:
    for folder, (_, at_save, _) in saved.values():
        weights = load_weights(folder / "step-00000003")
        assert same(
            {f"weight/{k}": v for k, v in weights.items()},
            {k: v for k, v in at_save.items() if k.startswith("weight/")},
        )


def assign(folder: Path) -> bool:
    """Weights into a bare model on two tensor-parallel ranks; same loss as the engine's?"""
    import toy

    from parallel.checkpoint import assign_weights, load_checkpoint

    engine = build(2, 0)
    bare = toy.ToyModel(engine.topology)
    path = latest_checkpoint(folder)
    load_checkpoint(engine, path)
    assign_weights(bare, load_weights(path), engine.topology)
    batch = toy.global_batch(5)
    return torch.equal(bare(batch), engine.module(batch))


def test_weights_enter_a_bare_tensor_parallel_model(saved) -> None:
    assert all(run_ranks(2, assign, saved["1 rank, stage 0"][0]))


# ------------------------------------------------------------------------------- full disk, kills


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
    from parallel.checkpoint import save, save_checkpoint, writer

    engine = build(1, 1)
    go(engine, 0, 1)
    save_checkpoint(engine, folder, 1, CURSOR)
    go(engine, 1, 2)
    count = 0

    def counted(original):
        def operation(*args, **kwargs):
            nonlocal count
            count += 1
            if count == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        return operation

    writer.TensorWriter._put = counted(writer.TensorWriter._put)
    for name in ("write_synced", "sync_folder", "_make_empty"):
        setattr(save, name, counted(getattr(save, name)))
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


# ------------------------------------------------------------------------------- damage, pruning


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
