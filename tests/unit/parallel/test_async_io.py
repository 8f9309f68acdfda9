"""What building DeepSpeed's async_io needs, and that a build that was killed stops nobody.

A stand-in takes the place of the build; tests/distributed/test_swapping.py makes the real one.
"""

from __future__ import annotations

import os
import shutil
import sysconfig
import threading
from pathlib import Path

import pytest

from parallel.async_io import build_folders, load_async_io, missing_for_swapping
from parallel.errors import LayoutError


@pytest.fixture(autouse=True)
def _own_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder for builds and the headers of Python, which this machine may lack."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / "Python.h").touch()
    _pretend(monkeypatch, "include", tmp_path / "include")


def test_what_a_killed_build_left_behind_is_gone_when_the_next_one_starts() -> None:
    locks = [folder / "lock" for folder in build_folders()]
    for lock in locks:
        lock.touch()

    def load(folder: Path) -> None:
        assert folder / "lock" == locks[-1]
        seen.append([lock.exists() for lock in locks])

    seen: list[list[bool]] = []
    load_async_io(load)
    assert seen == [[False, False]]


def test_a_build_that_goes_on_is_waited_for_and_keeps_its_lock() -> None:
    """Two threads stand for two ranks: the lock belongs to the opened file, not to the process."""
    inside, go_on, events = threading.Event(), threading.Event(), []

    def first(folder: Path) -> None:
        (folder / "lock").touch()
        inside.set()
        assert go_on.wait(60)
        events.append(("first ends", (folder / "lock").exists()))

    def second(folder: Path) -> None:
        events.append(("second begins", (folder / "lock").exists()))

    ranks = [threading.Thread(target=load_async_io, args=(load,)) for load in (first, second)]
    ranks[0].start()
    assert inside.wait(60)
    ranks[1].start()
    ranks[1].join(0.5)
    go_on.set()
    for rank in ranks:
        rank.join(60)
    assert events == [("first ends", True), ("second begins", False)]


def test_ninja_is_found_beside_a_python_whose_environment_is_not_activated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DeepSpeed calls it by its name."""
    scripts, empty = tmp_path / "bin", tmp_path / "empty"
    scripts.mkdir()
    empty.mkdir()
    _pretend(monkeypatch, "scripts", scripts)
    monkeypatch.setenv("PATH", str(empty))
    monkeypatch.setenv("CXX", shutil.which("true", path=os.defpath) or "/bin/true")
    assert missing_for_swapping() == "the program ninja (pip install ninja)"
    (scripts / "ninja").write_text("#!/bin/sh\n")
    (scripts / "ninja").chmod(0o755)
    assert missing_for_swapping() is None
    found: list[str | None] = []
    load_async_io(lambda _: found.append(shutil.which("ninja")))
    assert found == [str(scripts / "ninja")]


def test_what_else_a_machine_may_lack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "true")
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("parallel.async_io._has_toolkit", lambda: False)
    assert missing_for_swapping() is None
    assert missing_for_swapping(cuda=True) == "the CUDA toolkit (set CUDA_HOME to its folder)"
    _pretend(monkeypatch, "include", tmp_path)
    assert "the package python3-dev" in str(missing_for_swapping())


def test_a_build_that_fails_says_what_the_compiler_said_and_what_to_do() -> None:
    def load(folder: Path) -> None:
        raise RuntimeError("\n".join(f"line {n}" for n in range(400)) + "\nfatal: no space left")

    with pytest.raises(LayoutError) as caught:
        load_async_io(load)
    text = str(caught.value)
    assert text.endswith("line 399\nfatal: no space left") and "line 100\n" not in text
    assert str(build_folders()[-1]) in text and "set parallel.offload to cpu" in text


def test_a_folder_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "file"))
    with pytest.raises(LayoutError, match=r"set TORCH_EXTENSIONS_DIR to a folder"):
        load_async_io(lambda _: None)


def _pretend(monkeypatch: pytest.MonkeyPatch, kind: str, folder: Path) -> None:
    """Let sysconfig say that this kind of file is in another folder."""
    real = sysconfig.get_path
    monkeypatch.setattr(
        "parallel.async_io.sysconfig.get_path",
        lambda name, *more: str(folder) if name == kind else real(name, *more),
    )
