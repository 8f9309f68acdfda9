"""`metrics.jsonl` and `config.yaml` under faults: full disks, files deleted during a run."""

from __future__ import annotations

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pretrain.tracking import jsonl
from pretrain.tracking.guard import GuardSink
from pretrain.tracking.jsonl import JsonlSink


@contextmanager
def full_disk(path: Path, room: int) -> Iterator[None]:
    """Let files grow to `room` bytes more than `path` has; a write takes what fits."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def steps(path: Path) -> list[int]:
    """Steps of all lines, each of which must be whole."""
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_a_disk_that_was_full_for_a_while_leaves_every_line_once_and_whole(tmp_path: Path) -> None:
    said: list[str] = []
    path = tmp_path / "metrics.jsonl"
    sink = JsonlSink(path, -1, report=said.append)
    sink.log({"loss": 1.0}, 0, 0.0)
    with full_disk(path, room=20):  # a part of a line fits
        for step in range(1, 6):
            sink.log({"loss": 1.0}, step, step)
            assert steps(path) == [0]
    for step in range(6, 9):
        sink.log({"loss": 1.0}, step, step)
    assert steps(path) == list(range(9))
    sink.close("finished")
    assert [text.partition(" ")[0] for text in said] == ["warning:", str(path)]
    assert said[1].endswith("is written again")


def test_a_disk_that_is_free_only_at_the_end_gets_the_lines_at_close(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    sink = JsonlSink(path, -1, report=lambda text: None)
    with full_disk(path, room=5):
        sink.log({"loss": 1.0}, 1, 0.0)
    sink.close("finished")
    assert steps(path) == [1]


def test_lines_that_memory_cannot_keep_are_counted(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(jsonl, "_WAITING_LINES", 3)
    said: list[str] = []
    path = tmp_path / "metrics.jsonl"
    sink = JsonlSink(path, -1, report=said.append)
    with full_disk(path, room=5):
        for step in range(5):
            sink.log({"loss": 1.0}, step, 0.0)
    sink.log({"loss": 1.0}, 5, 0.0)
    assert steps(path) == [3, 4, 5]
    assert "3 lines were lost" in said[-1]


def test_a_record_deleted_during_the_run_is_written_again_as_a_whole(tmp_path: Path) -> None:
    said: list[str] = []
    path = tmp_path / "run" / "metrics.jsonl"
    sink = JsonlSink(path, -1, report=said.append)
    for step in range(3):
        sink.log({"loss": 1.0}, step, 0.0)
    path.unlink()
    path.parent.rmdir()
    for step in range(3, 6):
        sink.log({"loss": 1.0}, step, 0.0)
    assert steps(path) == list(range(6))
    (line,) = said
    assert "deleted during the run; it was written again" in line


def test_a_record_that_an_editor_replaced_goes_on_in_the_new_file(tmp_path: Path) -> None:
    said: list[str] = []
    path = tmp_path / "metrics.jsonl"
    sink = JsonlSink(path, -1, report=said.append)
    sink.log({"loss": 1.0}, 1, 0.0)
    copy = tmp_path / "copy"
    copy.write_bytes(path.read_bytes())
    copy.replace(path)
    sink.log({"loss": 1.0}, 2, 0.0)
    assert steps(path) == [1, 2]
    assert "replaced" in said[0]


def test_a_configuration_deleted_during_the_run_is_written_again(tmp_path: Path) -> None:
    said: list[str] = []
    path = tmp_path / "config.yaml"
    path.write_text("run: {}\n")
    guard = GuardSink(path, report=said.append)
    guard.log({}, 1, 0.0)
    assert said == []
    path.unlink()
    guard.log({}, 2, 0.0)
    assert path.read_text() == "run: {}\n"
    (line,) = said
    assert "config.yaml was deleted during the run" in line
