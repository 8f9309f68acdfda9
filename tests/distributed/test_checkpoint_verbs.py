"""Checkpoints copied, exported and started from: the same tensors, from any layout into any."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from comparison import same
from harness import run_ranks
from layouts import TASKS, Layout, Trainer, as_dict, shallow
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from parallel.checkpoint import read_manifest, reshard_checkpoint, verify_checkpoint
from parallel.errors import CheckpointError, SaveError
from parallel.weights_file import read_header
from pretrain.checkpoints import export_checkpoint, reshard
from pretrain.errors import ConfigError


def save(layout: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Train two steps and save; all tensors."""
    from parallel.checkpoint import save_checkpoint

    trainer = Trainer(Layout(**layout), shallow(TASKS["masked"]), ema_decay=0.9)
    trainer.train(0, 2)
    state = {"config": {"a": 1}, "tokenizer": {"pieces_sha256": "abc"}}
    save_checkpoint(trainer.engine, folder / "checkpoints", 2, state)
    return tensors(trainer)


def tensors(trainer: Trainer) -> dict[str, Any]:
    kinds = ("weight", *trainer.engine.kinds)
    return {k: {n: trainer.engine.read(n, k).clone() for n in trainer.names()} for k in kinds}


@pytest.fixture(scope="module", params=[Layout(pp=2, zero=1), Layout(dp=2, zero=3)], ids=str)
def saved(request, tmp_path_factory):
    """A run folder with one checkpoint, and what it should hold."""
    folder = tmp_path_factory.mktemp("saved")
    return folder, run_ranks(2, save, as_dict(request.param), folder)[0]


def load(layout: dict[str, Any], folder: Path) -> dict[str, Any]:
    from parallel.checkpoint import load_latest

    trainer = Trainer(Layout(**layout), shallow(TASKS["masked"]), ema_decay=0.9)
    load_latest(trainer.engine, folder)
    return tensors(trainer)


def test_a_copy_with_other_files_restores_the_same_tensors(saved, tmp_path) -> None:
    folder, want = saved
    result = reshard(folder, tmp_path, files=3)
    assert result["written_files"] == 5  # weights, averages, three of moments
    sizes = [
        e.bytes for n, e in read_manifest(tmp_path / "step-00000002").files.items() if "o" in n
    ]
    assert max(sizes) < 2 * min(sizes)
    got = run_ranks(2, load, as_dict(Layout(tp=2)), tmp_path)[0]
    assert all(same(got[kind], want[kind]) for kind in want)
    with pytest.raises(CheckpointError, match="exists already"):
        reshard(folder, tmp_path)


def test_a_copy_without_moments_keeps_the_weights(saved, tmp_path) -> None:
    folder, want = saved
    made = Path(reshard(folder, tmp_path, weights_only=True)["written"])
    assert sorted(verify_checkpoint(made).files) == ["ema.safetensors", "weights.safetensors"]
    got = run_ranks(1, load, as_dict(Layout()), tmp_path)[0]
    assert same(got["weight"], want["weight"])
    assert same(got["ema"], want["ema"])


def test_damage_is_found_and_not_copied(saved, tmp_path) -> None:
    folder, _ = saved
    copy = reshard_checkpoint(folder / "checkpoints" / "step-00000002", tmp_path / "copy")
    assert reshard(copy, None)["verified_files"] == len(read_manifest(copy).files)
    file = copy / "weights.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"hash of weights\.safetensors"):
        reshard(copy, tmp_path / "other")
    assert not (tmp_path / "other").exists()
    with pytest.raises(CheckpointError, match=r"hash of weights\.safetensors"):
        export_checkpoint(copy, tmp_path / "w.safetensors", weights="raw")
    assert not (tmp_path / "w.safetensors").exists()
    with pytest.raises(ConfigError, match="neither a checkpoint nor a run"):
        reshard(tmp_path, None)


@pytest.mark.parametrize(("weights", "kind"), [("raw", "weight"), ("ema", "ema"), (None, "ema")])
def test_an_export_holds_the_whole_weights(saved, tmp_path, weights, kind) -> None:
    folder, want = saved
    out, half = tmp_path / "w.safetensors", tmp_path / "h.safetensors"
    export_checkpoint(folder, out, weights=weights)
    assert same(load_file(out), want[kind])
    export_checkpoint(folder, half, weights=weights, dtype="bfloat16")
    assert same(load_file(half), {n: w.bfloat16() for n, w in want[kind].items()})
    with safe_open(half, framework="pt") as opened:
        about = opened.metadata()
    assert (about["step"], about["dtype"], about["format"]) == ("2", "bfloat16", "pt")
    assert json.loads(about["config"]) == {"a": 1}
    assert json.loads(about["tokenizer"]) == {"pieces_sha256": "abc"}
    files = read_manifest(folder / "checkpoints" / "step-00000002").files
    assert json.loads(about["source_sha256"]) == {n: e.sha256 for n, e in files.items()}
    with pytest.raises(SaveError, match="exists already"):
        export_checkpoint(folder, out)


def start_from(layout: dict[str, Any], file: Path) -> dict[str, Any] | str:
    from parallel.checkpoint import load_file_weights

    trainer = Trainer(Layout(**layout), shallow(TASKS["masked"]), ema_decay=0.9)
    try:
        load_file_weights(trainer.engine, file)
    except CheckpointError as error:
        return str(error)
    trained = tensors(trainer)
    trainer.train(0, 1)
    return trained


@pytest.mark.parametrize(
    "layout",
    [Layout(), Layout(tp=2), Layout(pp=2, zero=1), Layout(dp=2, zero=3, precision="bfloat16")],
    ids=str,
)
def test_a_run_starts_from_a_file_in_any_layout(saved, tmp_path, layout) -> None:
    folder, want = saved
    export_checkpoint(folder, tmp_path / "w.safetensors", weights="raw")
    for got in run_ranks(layout.ranks, start_from, as_dict(layout), tmp_path / "w.safetensors"):
        assert same(got["weight"], want["weight"])
        assert same(got["ema"], want["weight"])


def test_a_file_of_another_model_is_refused_with_what_differs(saved, tmp_path) -> None:
    _, want = saved
    weights = dict(want["weight"])
    first, second, *_ = weights
    weights["strange"] = weights.pop(first)
    weights[second] = torch.zeros(3, 5)
    save_file(weights, tmp_path / "w.safetensors")
    for message in run_ranks(
        2, start_from, as_dict(Layout(pp=2, zero=1)), tmp_path / "w.safetensors"
    ):
        assert f"missing (1): {first}" in message
        assert "unknown (1): strange" in message
        assert f"other shapes (1): {second} has shape [3, 5], the model " in message


def test_only_safetensors_are_read(tmp_path) -> None:
    for name in ("w.pt", "w.bin", "w.ckpt"):
        with pytest.raises(CheckpointError, match="is a pickle"):
            read_header(tmp_path / name)
    with pytest.raises(CheckpointError, match="cannot read"):
        read_header(tmp_path / "none.safetensors")
    for content in (b"", b"\x80\x04 not this", b"\x02\0\0\0\0\0\0\0[]", b"\xff" * 64):
        (tmp_path / "w.safetensors").write_bytes(content)
        with pytest.raises(CheckpointError, match="not a safetensors file"):
            read_header(tmp_path / "w.safetensors")
    save_file({"w": torch.zeros(2, dtype=torch.int64)}, tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match="type I64"):
        read_header(tmp_path / "w.safetensors")


def evaluate(run: Path) -> float:
    from pretrain.evaluation.run import evaluate_run

    return evaluate_run(run)["nats_per_token"]


def test_a_run_exports_and_another_one_starts_there(pool: Path, tmp_path: Path) -> None:
    from pretrain.cli.main import app

    first, second, file = tmp_path / "first", tmp_path / "second", tmp_path / "w.safetensors"
    short = ("train.stop_step=4", "train.eval_epochs=[]")
    assert run_ranks(1, runs.train, pool, first, *short, launcher=False) == [0]
    said = CliRunner().invoke(app, ["export", str(first), str(file), "--json"])
    assert json.loads(said.output)["step"] == 4
    said = CliRunner().invoke(app, ["reshard", str(first)])
    assert "verified_files" in said.output
    still = ("train.stop_step=1", "optimizer.lr=1e-12", f"run.init_from={file}")
    assert run_ranks(2, runs.train, pool, second, *still) == [0, 0]
    want = run_ranks(1, evaluate, first, launcher=False)[0]
    assert runs.log(second)[1]["validation/nats_per_token"] == pytest.approx(want, rel=1e-6)
    # Once the run has a checkpoint of its own, the file is not needed any more.
    file.unlink()
    still = ("train.stop_step=2", *still[1:])
    assert run_ranks(1, runs.train, pool, second, *still, launcher=False) == [0]
    with safe_open(first / "checkpoints/step-00000004/weights.safetensors", "pt") as opened:
        assert opened.metadata() is None
