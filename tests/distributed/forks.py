"""The process behind the harness: imports everything once, then forks ranks on request.

A fork shares its parent's memory until either writes to it, so a rank starts in milliseconds with
all modules imported, and what a test changes in them dies with the rank.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib.util
import json
import os
import pickle
import pkgutil
import select
import signal
import socket
import sys
import time
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

IMPORTED_LATE = (
    "data_pipeline.stream.loader",
    "deepspeed.comm.mori",
    "deepspeed.module_inject.auto_ep_config",
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.ops.triton_ops",
    "deepspeed.runtime.superoffload.superoffload_stage3",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "deepspeed.sequence.layer",
    "hydra.core.plugins",
    "parallel.checkpoint",
    "parallel.engine.build",
    "parallel.engine.pipeline",
    "parallel.engine.single_stage",
    "pretrain.evaluation.run",
    "pretrain.sampling.run",
    "pretrain.tracking.console",
    "pretrain.tracking.jsonl",
    "pretrain.tracking.queue",
    "pretrain.train",
    "pretrain.training.adamw",
    "pretrain.training.hooks",
    "pretrain.training.session",
    "sentencepiece.sentencepiece_model_pb2",
    "torch._dynamo",
)
"""What DeepSpeed and the package import inside functions, and most ranks use."""

GRACE_SECONDS = 5.0
"""How long the other ranks may go on after one has failed."""


def load_source(path: str) -> ModuleType:
    """The module in a test file, imported from its path; its folder becomes importable."""
    folder = str(Path(path).parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    name = Path(path).stem
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def serve() -> None:
    """Body of the helper: import, then fork ranks for every request line on stdin."""
    parent = os.getppid()
    requests = os.fdopen(os.dup(0), "r")
    answers = os.fdopen(os.dup(1), "w")
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(2, 1)  # whatever an import prints must not become an answer
    sys.path.insert(0, str(Path(__file__).parent))
    _import_for_ranks()
    while line := requests.readline():
        request = json.loads(line)
        _preload(request["source"])
        _precompose(request["choices"])
        children = _fork_all(request)
        codes = _wait(children, request["timeout"], request["may_die"], parent)
        answers.write(json.dumps(codes) + "\n")
        answers.flush()


def _import_for_ranks() -> None:
    """Import what nearly every rank needs, and let the grammar of overrides fill its caches."""
    from parallel.imports import warm_up

    warm_up()
    from pretrain import objectives

    families = [f"pretrain.objectives.{m.name}" for m in pkgutil.iter_modules(objectives.__path__)]
    for name in (*IMPORTED_LATE, *families):
        importlib.import_module(name)
    # ZeRO 3 on a CPU starts a program at every reduction to count NUMA nodes.
    from deepspeed.utils import numa

    numa.get_numa_cores = functools.cache(numa.get_numa_cores)
    import runs

    from pretrain.config.compose import compose

    compose(runs.overrides(Path("pool"), Path("run")))
    _spare_from_collection()


def _preload(source: str) -> None:
    """Import the file of a function, unless it is there; a rank reports what is wrong with it."""
    if Path(source).stem in sys.modules:
        return
    with contextlib.suppress(Exception):
        load_source(source)
    _spare_from_collection()


def _precompose(choices: list[str]) -> None:
    """Compose a configuration of these groups, which every rank of the request then has."""
    from pretrain.config import compose, groups

    known = groups._composed.cache_info().misses
    with contextlib.suppress(Exception):
        compose.compose(choices)
    if groups._composed.cache_info().misses > known:
        _spare_from_collection()


def _spare_from_collection() -> None:
    """Take all there is from the garbage collector's lists: its first full collection in a rank
    would write to every object, so that the kernel copies all memory shared with the helper."""
    gc.collect()
    gc.freeze()


def _fork_all(request: dict[str, Any]) -> list[int]:
    """Fork every rank; they meet at a socket that listens already, which rank 0 takes over: no
    other program can take its port in between."""
    with socket.create_server(("127.0.0.1", 0)) as meeting:
        return [_fork(rank, request, meeting) for rank in range(request["ranks"])]


def _fork(rank: int, request: dict[str, Any], meeting: socket.socket) -> int:
    """Fork one rank; the parent gets its process id."""
    pid = os.fork()
    if pid:
        return pid
    os.setpgid(0, 0)
    code = 1
    try:
        folder = Path(request["folder"])
        output = os.open(folder / f"output-{rank}.txt", os.O_WRONLY | os.O_CREAT, 0o644)
        os.dup2(output, 1)
        os.dup2(output, 2)
        if request["launcher"]:
            os.environ.update(
                RANK=str(rank),
                LOCAL_RANK=str(rank),
                WORLD_SIZE=str(request["ranks"]),
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=str(meeting.getsockname()[1]),
                MASTER_LISTEN_FD=str(meeting.fileno()),
            )
        if rank > 0 or not request["launcher"]:
            meeting.close()
        code = _run(rank, folder, request["source"])
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _run(rank: int, folder: Path, source: str) -> int:
    """Run the requested function on this rank and leave its result in the folder."""
    try:
        module = load_source(source)
        qualname, args, kwargs = pickle.loads((folder / "call.pkl").read_bytes())
        function: Any = module
        for part in qualname.split("."):
            function = getattr(function, part)
        result = (True, function(*args, **kwargs))
    except BaseException:
        result = (False, traceback.format_exc())
    partial = folder / f"partial-{rank}.pkl"
    partial.write_bytes(pickle.dumps(result))
    partial.rename(folder / f"result-{rank}.pkl")
    from parallel.runtime import shutdown

    if result[0]:
        shutdown()
    return 0 if result[0] else 1


def _wait(children: list[int], timeout: float, may_die: bool, parent: int) -> list[int]:
    """Wait for all ranks; kill the rest when time is up, shortly after one has failed, or when
    nobody waits for their results (another worker's test has failed)."""
    deadline = time.monotonic() + timeout
    codes: dict[int, int] = {}
    while len(codes) < len(children):
        for pid in children:
            if pid in codes:
                continue
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[pid] = os.waitstatus_to_exitcode(status)
                if codes[pid] and not may_die:
                    deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        late = time.monotonic() > deadline or os.getppid() != parent
        if len(codes) < len(children) and late:
            for pid in children:
                if pid not in codes:
                    os.killpg(pid, signal.SIGKILL)
            deadline = float("inf")
        select.select([], [], [], 0.01)
    return [codes[pid] for pid in children]


if __name__ == "__main__":
    serve()
