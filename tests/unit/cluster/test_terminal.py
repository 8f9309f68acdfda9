"""A process outlives its terminal and whoever reads its output."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import os, signal, sys
from cluster.terminal import outlive_terminal
outlive_terminal()
print("first", flush=True)
sys.stdin.readline()
os.kill(os.getpid(), signal.SIGHUP)
for number in range(2000):
    print("line", number, "of more bytes than a pipe holds" * 4)
    print("error", number, file=sys.stderr)
open(sys.argv[1], "w").write("done")
"""


def start(tmp_path: Path, **streams: int | None) -> subprocess.Popen[bytes]:
    words = [sys.executable, "-c", PROGRAM, str(tmp_path / "end")]
    return subprocess.Popen(words, stdin=subprocess.PIPE, **streams)


def end(process: subprocess.Popen[bytes], tmp_path: Path) -> str:
    """What the program left, after it was told to go on."""
    assert process.stdin is not None
    process.stdin.write(b"\n")
    process.stdin.close()
    assert process.wait(timeout=60) == 0
    return (tmp_path / "end").read_text()


def test_a_closed_pipe(tmp_path: Path) -> None:
    process = start(tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline() == b"first\n"  # as `head -1` does
    process.stdout.close()
    process.stderr.close()
    assert end(process, tmp_path) == "done"


def test_a_vanished_terminal(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    process = start(tmp_path, stdout=theirs, stderr=theirs)
    os.close(theirs)
    assert os.read(ours, 100).startswith(b"first")
    os.close(ours)
    assert end(process, tmp_path) == "done"


def test_a_full_disk(tmp_path: Path) -> None:
    with open("/dev/full", "wb") as full:
        process = start(tmp_path, stdout=full.fileno(), stderr=full.fileno())
    assert end(process, tmp_path) == "done"
