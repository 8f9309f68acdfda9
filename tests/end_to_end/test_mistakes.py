"""What users get wrong: an error that says what to change, a non-zero exit, nothing lost."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from installed import ONE_EPOCH


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["data.train=/nowhere/manifest.json"], 3, ["/nowhere/manifest.json"]),
        (["data.unique_tokens=99000000"], 2, ["99,000,000", "unique_tokens", "pool"]),
        (["parallel.tensor_parallel_size=3"], 2, ["tensor_parallel_size 3", "1, 2, 4"]),
        (["optimizer.learning_rate=1e-3"], 2, ["optimizer.learning_rate", "optimizer.lr"]),
        (["objective=maksed"], 2, ["maksed", "masked"]),
        (["objective.name=maksed"], 2, ["maksed", "masked"]),
        (["train.global_batch_size=7", "train.micro_batch_size=2"], 2, ["micro_batch_size 2"]),
        (["train.precision=bfloat16", "parallel.zero_stage=0"], 2, ["zero_stage"]),
        (["data.seq_length=0"], 2, ["data.seq_length"]),
        (["model.hidden_size=30"], 2, ["hidden_size 30"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) and "=" in value[0] else None,
)
def test_a_wrong_configuration_is_refused_before_anything_starts(
    program, overrides: list[str], tmp_path: Path, arguments: list[str], code: int, words: list[str]
):
    result = program("train", *overrides, *arguments)
    assert result.returncode == code, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in result.stderr
    assert not (tmp_path / "r").exists()


def test_an_empty_corpus_is_refused(program, tmp_path: Path):
    (tmp_path / "empty.txt").write_text("")
    result = program("data", "prepare", tmp_path / "empty.txt", "--out", tmp_path / "out")
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert "empty" in result.stderr


def test_a_tokenizer_of_other_shards_is_refused(program, overrides, pool: Path, tmp_path: Path):
    other = tmp_path / "other.model"
    shutil.copy(pool / "tokenizer.model", other)
    with other.open("ab") as file:
        file.write(b"\x00")
    result = program("train", *overrides, f"data.tokenizer={other}")
    assert result.returncode == 2
    assert "tokenizer" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_damaged_shard_is_refused_and_named(rank, overrides, pool: Path, tmp_path: Path):
    copy = tmp_path / "pool"
    shutil.copytree(pool / "train", copy)
    shard = next(copy.glob("*.tar"))
    data = bytearray(shard.read_bytes())
    data[700] ^= 1
    shard.chmod(0o644)
    shard.write_bytes(bytes(data))
    result = rank(*overrides, f"data.train={copy / 'manifest.json'}")
    assert result.returncode == 3, result.stdout + result.stderr
    assert shard.name in result.stderr + result.stdout


def test_a_run_folder_of_another_configuration_is_refused_and_kept(
    rank, finished: Path, overrides, tmp_path: Path
):
    shutil.copytree(finished, tmp_path / "r")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "r" / "checkpoints").rglob("*")}
    result = rank(*overrides, *ONE_EPOCH, "model.hidden_size=64")
    assert result.returncode in (2, 4)
    assert "model.hidden_size" in result.stderr
    assert "32" in result.stderr
    assert "64" in result.stderr
    after = {p: p.stat().st_mtime_ns for p in (tmp_path / "r" / "checkpoints").rglob("*")}
    assert after == before


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small tmpfs needs root")
def test_a_full_disk_while_saving_ends_the_run_and_keeps_what_was_saved(
    rank, overrides, tmp_path: Path
):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=700k", "tmpfs", str(disk)]
    if subprocess.run(mount, check=False).returncode:
        pytest.skip("tmpfs cannot be mounted here")
    try:
        more = ["train.checkpoint_interval=5", "train.keep_checkpoints=0"]
        result = rank(*overrides, *more, f"run.dir={disk / 'r'}", "data.epochs=1")
        assert result.returncode == 5, result.stdout + result.stderr
        assert "could not be written" in result.stdout + result.stderr
        saved = sorted((disk / "r" / "checkpoints").glob("step-*"))
        assert saved, "the first checkpoint fits"
        # With room again the run goes on from what was saved.
        subprocess.run(["mount", "-o", "remount,size=20m", str(disk)], check=True)
        result = rank(*overrides, *more, f"run.dir={disk / 'r'}", "data.epochs=1")
        assert result.returncode == 0, result.stdout + result.stderr
        assert f"resumed from {saved[-1]}" in result.stdout
    finally:
        subprocess.run(["umount", str(disk)], check=False)
