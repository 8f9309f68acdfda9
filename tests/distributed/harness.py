"""Run a function on N real gloo ranks and get back what every rank returned.

    from harness import run_ranks
    losses = run_ranks(2, train_a_little, zero_stage=1)     # [return of rank 0, return of rank 1]

One helper process imports torch, DeepSpeed and megatron-core once for the whole test session (more
than ten seconds), later the file of each function and composed configurations too, and forks fresh
ranks for every call. So a call costs hardly more than its work, and no state leaks from one case
into the next. A rank that raises, dies or hangs fails the call with the output and traceback of
every rank; all its processes are gone afterwards.

The function must be defined at the top level of a file; arguments and results are pickled. Inside
it, RANK, WORLD_SIZE, LOCAL_RANK and MASTER_* are set as a launcher sets them. A rank that means to
die (`os._exit`, `os.kill`) does so with `may_die=True`; its result is then a `Died`.
"""

from __future__ import annotations

import atexit
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import forks

_CHOICE = re.compile(r"[a-z]+=\w+")
"""GROUP=OPTION among the arguments: a choice that ranks are going to compose."""


class RankError(AssertionError):
    """At least one rank raised, died or hung; the message holds the output of all."""


@dataclass(frozen=True)
class Died:
    """Result of a rank that ended without returning: its exit code, negative for a signal."""

    code: int


def run_ranks(
    ranks: int,
    function: Callable[..., Any],
    /,
    *args: Any,
    timeout: float = 120.0,
    may_die: bool = False,
    launcher: bool = True,
    **kwargs: Any,
) -> list[Any]:
    """Results of `function(*args, **kwargs)` on every rank, by rank.

    `launcher=False` starts one rank without any launcher variables. Raises RankError.
    """
    assert launcher or ranks == 1, "only a single rank can start without a launcher"
    folder = Path(tempfile.mkdtemp(prefix="ranks-"))
    try:
        source = function.__globals__["__file__"]
        (folder / "call.pkl").write_bytes(pickle.dumps((function.__qualname__, args, kwargs)))
        request = {
            "ranks": ranks,
            "folder": str(folder),
            "source": str(Path(source).resolve()),
            "timeout": timeout,
            "launcher": launcher,
            "may_die": may_die,
            "choices": [a for a in args if isinstance(a, str) and _CHOICE.fullmatch(a)],
        }
        codes = _helper().request(request)
        results = [_result(folder, rank, code) for rank, code in enumerate(codes)]
        bad = [r for r in results if isinstance(r, str) or (isinstance(r, Died) and not may_die)]
        if bad:
            raise RankError(_report(function.__qualname__, folder, results))
        return [r[0] if isinstance(r, tuple) else r for r in results]
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _result(folder: Path, rank: int, code: int) -> Any:
    """(value,) of a rank that returned, its traceback as text, or Died."""
    path = folder / f"result-{rank}.pkl"
    if not path.exists():
        return Died(code)
    ok, value = pickle.loads(path.read_bytes())
    return (value,) if ok else value


def _report(name: str, folder: Path, results: list[Any]) -> str:
    lines = [f"{name} failed"]
    for rank, result in enumerate(results):
        output = (folder / f"output-{rank}.txt").read_text(errors="replace")[-4000:]
        state = "returned" if isinstance(result, tuple) else result
        lines.append(f"--- rank {rank}: {state}\n{output}".rstrip())
    return "\n".join(lines)


class _Helper:
    """The process that has everything imported and forks ranks on request."""

    def __init__(self) -> None:
        env = dict(os.environ, DS_ACCELERATOR="cpu", CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            env.pop(name, None)
        self._process = subprocess.Popen(
            [sys.executable, forks.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=env,
            start_new_session=True,
        )

    def request(self, request: dict[str, Any]) -> list[int]:
        """Exit codes of the ranks, once all of them have ended."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RankError("the process that starts ranks has died; see its error output above")
        return json.loads(answer)

    def alive(self) -> bool:
        """Whether requests can still be sent."""
        return self._process.poll() is None

    def close(self) -> None:
        """End the helper; its ranks have ended already."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process.wait(timeout=30)


_HELPERS: list[_Helper] = []


def _helper() -> _Helper:
    """The session's helper, started on first use."""
    if not _HELPERS or not _HELPERS[-1].alive():
        _HELPERS.append(_Helper())
        atexit.register(_HELPERS[-1].close)
    return _HELPERS[-1]
