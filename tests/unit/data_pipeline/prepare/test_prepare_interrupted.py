"""A preparation killed at any moment, or out of disk, ends with the same bytes once it is let."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.corpus.builtin import builtin_documents
from data_pipeline.corpus.source import SourceSettings
from data_pipeline.errors import DataError
from data_pipeline.prepare import pack
from data_pipeline.prepare.prepare import prepare
from data_pipeline.prepare.settings import PrepareSettings, TokenizerSettings
from data_pipeline.shards import shards


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    documents = [t[:500] for _, (_, t) in zip(range(60), builtin_documents(), strict=False)]
    for part in range(3):
        lines = [json.dumps({"text": text}) + "\n" for text in documents[part::3]]
        (folder / f"{part}.jsonl").write_text("".join(lines))
    return folder


def settings_for(source: Path, out: Path, workers: int = 1) -> PrepareSettings:
    return PrepareSettings(
        out=out,
        sources=(SourceSettings(path=str(source)),),
        tokenizer=TokenizerSettings(model_type="bpe", vocab_size=500, num_threads=1),
        validation_fraction=0.2,
        member_bytes=2048,
        members_per_shard=4,
        workers=workers,
    )


def files(folder: Path) -> dict[str, bytes]:
    found = (p for p in folder.rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in found}


@pytest.fixture
def memory_folder(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is one: dozens of starts sync hundreds of files."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def undisturbed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    prepare(settings_for(source, out))
    return files(out)


@pytest.mark.parametrize("mode", ["publications", "moments"])
def test_killed_dozens_of_times_it_ends_with_the_same_bytes(
    source: Path, undisturbed: dict[str, bytes], memory_folder: Path, mode: str
) -> None:
    """SIGKILL around every kind of file that is written, and at random moments."""
    settings = settings_for(source, memory_folder / "first")
    script, out = Path(__file__).with_name("kill_preparation.py"), memory_folder / "out"
    command = [sys.executable, script, mode, settings.model_dump_json(), out, "30"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) >= 30
    finished = list(out.iterdir())
    assert finished
    assert all(files(folder) == undisturbed for folder in finished)


def test_killed_with_worker_processes_leaves_none_behind(
    source: Path, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    """SIGKILL of the parent ends its workers; the next start, with processes, gives the bytes."""
    settings = settings_for(source, tmp_path / "out", workers=2)
    code = (
        "import sys\nfrom data_pipeline.prepare.prepare import prepare\n"
        "from data_pipeline.prepare.settings import PrepareSettings\n"
        "if __name__ == '__main__':\n"
        "    prepare(PrepareSettings.model_validate_json(sys.argv[1]))\n"
    )
    script = tmp_path / "run.py"
    script.write_text(code)
    for delay in (0.0, 0.5):  # workers that have just started, workers at work
        process = subprocess.Popen([sys.executable, script, settings.model_dump_json()])
        children: set[int] = set()
        while len(children) < 2:
            assert process.poll() is None, "the preparation ended without workers"
            time.sleep(0.01)
            children |= children_of(process.pid)
        time.sleep(delay)
        children |= children_of(process.pid)
        process.kill()
        process.wait()
        deadline = time.monotonic() + 60
        while any(Path(f"/proc/{pid}/stat").exists() and not is_zombie(pid) for pid in children):
            assert time.monotonic() < deadline, "a worker survived its parent"
            time.sleep(0.05)
    subprocess.run([sys.executable, script, settings.model_dump_json()], check=True)
    assert files(settings.out) == undisturbed


def children_of(parent: int) -> set[int]:
    text = Path(f"/proc/{parent}/task/{parent}/children").read_text()
    return {int(pid) for pid in text.split()}


def is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


@pytest.mark.parametrize("number", range(1, 40, 3))
def test_full_disk_is_reported_and_survived(
    source: Path,
    undisturbed: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
) -> None:
    """The disk is full at the `number`-th sync; the error names the folder, nothing is lost."""
    out, fsync, count = tmp_path / "out", os.fsync, 0

    def full(descriptor: int) -> None:
        nonlocal count
        count += 1
        if count == number:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match=r"No space left.*start again"):
        prepare(settings_for(source, out))
    assert not (out / "report.json").exists()
    assert not list(out.rglob("*.tmp*"))
    prepare(settings_for(source, out))
    assert files(out) == undisturbed


def test_other_settings_after_an_unfinished_start_begin_again(
    source: Path, undisturbed: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A start that failed (here: too large a vocabulary, then a full disk) is no obstacle."""
    settings = settings_for(source, tmp_path / "out")
    large = TokenizerSettings(model_type="bpe", vocab_size=9999, num_threads=1)
    with pytest.raises(DataError, match="lower vocab_size"):
        prepare(settings.model_copy(update={"tokenizer": large}))
    smaller = settings.model_copy(update={"seed": 5, "member_bytes": 1024})
    writing = shards.write_shard

    def full(folder: Path, layout: Any, index: int, read: Any, stop: int) -> Any:
        if index == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return writing(folder, layout, index, read, stop)

    monkeypatch.setattr(pack, "write_shard", full)
    with pytest.raises(DataError, match="No space left"):
        prepare(smaller)
    monkeypatch.undo()
    prepare(settings)
    assert files(settings.out) == undisturbed


def test_two_preparations_of_one_folder_do_not_meet(source: Path, tmp_path: Path) -> None:
    settings = settings_for(source, tmp_path / "out")
    settings.out.mkdir()
    with open(settings.out / ".lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="another preparation is working"):
            prepare(settings)
    assert not prepare(settings).already_done
