"""`epochal train`: check, write the configuration, start DeepSpeed's launcher, report the outcome.

The launcher's exit code is not believed (it is 0 when its own child was killed); the outcome is
what the ranks state in `RUN/status.json`. One process at a time may train in a run folder. Ranks
started by SLURM or torchrun do not pass through here: they run `pretrain.train` themselves.
"""

from __future__ import annotations

import fcntl
import os
import shlex
import shutil
import socket
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from pretrain.config.compose import save_config
from pretrain.config.run import Config
from pretrain.errors import EXIT_PREEMPTED, ConfigError, LaunchError
from pretrain.hosts import read_hostfile
from pretrain.status import read_status

MODULE = "pretrain.train"
LAUNCHER_PID = "EPOCHAL_LAUNCHER_PID"
"""Tells ranks whose death ends them; see `pretrain.resilience.orphan`."""
_FORWARDED = (
    *("DS_ACCELERATOR", "OMP_NUM_THREADS", "CUDA_DEVICE_MAX_CONNECTIONS"),
    *("GLOO_SOCKET_IFNAME", "NCCL_", "TORCH_"),
)
"""Variables that other hosts need; DeepSpeed itself forwards only PYTHON*, MLFLOW* and a few."""
_KEEP_ALIVE = "-o ServerAliveInterval=15 -o ServerAliveCountMax=4"
"""Without it ssh, and so the launcher, waits for ever on a host that lost its network."""


@dataclass(frozen=True)
class Launch:
    """A command that starts the ranks of one run, and what it adds to the environment."""

    command: list[str]
    environment: dict[str, str]
    hosts: tuple[str, ...] = ()
    """Other machines that ranks run on; empty when all run here."""

    def __str__(self) -> str:
        shown = {k: v for k, v in self.environment.items() if k != LAUNCHER_PID}
        variables = [f"{k}={shlex.quote(v)}" for k, v in sorted(shown.items())]
        return " ".join([*variables, shlex.join(self.command)])


@dataclass(frozen=True)
class Outcome:
    """How a run ended, as far as it could tell."""

    state: str
    step: int | None
    message: str
    exit_code: int

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return dict(self.__dict__)


def plan_launch(config: Config, environ: Mapping[str, str] | None = None) -> Launch:
    """The launcher command for a settled configuration; raises ConfigError where none can work."""
    environ = os.environ if environ is None else environ
    run, hostfile = config.run.path, config.parallel.hostfile
    environment = {LAUNCHER_PID: str(os.getpid())}
    on_cpu = config.run.device == "cpu" or (config.run.device == "auto" and not has_gpu())
    command = [_deepspeed()]
    slots = read_hostfile(hostfile) if hostfile is not None else {}
    ranks_here, hosts = config.world_size, tuple(slots)
    if set(hosts) <= {"localhost", "127.0.0.1", socket.gethostname()}:
        hosts = ()  # DeepSpeed would want ssh to this very machine
    if hosts:
        command += ["--hostfile", str(hostfile), "--force_multi"]
        ranks_here = max(slots.values())
        environment["DS_ENV_FILE"] = str(run / "deepspeed_env")
        old = environ.get("PDSH_SSH_ARGS_APPEND", "")
        environment["PDSH_SSH_ARGS_APPEND"] = f"{old} {_KEEP_ALIVE}".strip()
    elif on_cpu or "CUDA_VISIBLE_DEVICES" not in environ:
        command += ["--num_gpus", str(config.world_size)]
    else:
        # With --num_gpus DeepSpeed would ignore this variable and take the first GPUs instead.
        environment["CUDA_VISIBLE_DEVICES"] = _visible(environ["CUDA_VISIBLE_DEVICES"], config)
    if on_cpu:
        environment["DS_ACCELERATOR"] = "cpu"
    if "OMP_NUM_THREADS" not in environ or config.parallel.threads_per_rank is not None:
        threads = config.parallel.threads_per_rank or max(1, _cores() // ranks_here)
        environment["OMP_NUM_THREADS"] = str(threads)
    command += ["--master_port", str(_free_port()), "--no_local_rank", "--log_level", "error"]
    command += ["--module", MODULE, "--config", str(run / "config.yaml")]
    return Launch(command, environment, hosts)


def launch(config: Config, *, output: IO[str] | None = None) -> Outcome:
    """Train a checked configuration to its end, its failure or a signal; see `Outcome`.

    `output` takes what the ranks print (default: this process's standard output).
    """
    from pretrain.supervise import supervise

    run = config.run.path
    plan = plan_launch(config)
    with exclusive(run) as lock:
        write_run(config)
        if plan.hosts:
            _write_environment_file(plan, run / "deepspeed_env")
        print(plan, file=output or sys.stdout, flush=True)
        ended = supervise(plan, output=output, keep_open=lock)
        return judge(read_status(run), ended.return_code, ended.stopped_by)


def judge(status: dict[str, Any] | None, return_code: int, stopped_by: str | None) -> Outcome:
    """What a run's last statement and its launcher's exit code amount to."""
    state = status["state"] if status else None
    step = status["step"] if status else None
    if status and state in ("finished", "preempted", "failed"):
        message, code = status["message"], status["exit_code"]
        if state == "failed" and code == 1 and return_code > 192:  # a negative code, modulo 256
            killed = (
                f"a rank was killed by signal {256 - return_code} (9: often out of memory, then "
                f"lower train.micro_batch_size)"
            )
            message, code = f"{killed}; the others met {message}", LaunchError.exit_code
        return Outcome(state, step, message, code)
    at = "before the first step" if step is None else f"after it was at step {step:,}"
    if stopped_by and state is None:
        message = f"{stopped_by} before training began; nothing had to be saved"
        return Outcome("preempted", step, message, EXIT_PREEMPTED)
    if 1 < return_code <= 5 and state is None:  # a rank has printed why
        return Outcome("failed", step, "", return_code)
    message = (
        f"the ranks died {at} (launcher exit code {return_code}): out of memory (then lower "
        f"train.micro_batch_size), killed, or an error above; checkpoints are intact, start the "
        f"same command again to resume"
    )
    return Outcome("failed", step, message, LaunchError.exit_code)


def write_run(config: Config) -> Path:
    """Write RUN/config.yaml, keeping an earlier, different one as config.N.yaml; the path.

    What an earlier attempt said about its end is forgotten.
    """
    path = config.run.path / "config.yaml"
    (path.parent / "status.json").unlink(missing_ok=True)
    if path.exists():
        from pretrain.config.compose import load_config

        if load_config(path) == config:
            return path
        taken = [int(p.name.split(".")[1]) for p in path.parent.glob("config.[0-9]*.yaml")]
        shutil.copyfile(path, path.with_name(f"config.{max(taken, default=0) + 1}.yaml"))
    save_config(config, path)
    return path


@contextmanager
def exclusive(run: Path) -> Iterator[int]:
    """Hold the run folder; raises ConfigError when another process trains in it.

    Yields the descriptor that holds the lock. The launcher inherits it, so that ranks which save
    after this process was killed keep the folder too.
    """
    try:
        run.mkdir(parents=True, exist_ok=True)
        handle = (run / ".lock").open("a+")
    except OSError as error:
        raise ConfigError(f"cannot use the run folder {run}: {error.strerror}") from None
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            handle.seek(0)
            owner = handle.read().strip() or "another process"
            raise ConfigError(
                f"{run} is in use by {owner}; wait for it, stop it, or choose another run.name"
            ) from None
        handle.truncate(0)
        handle.write(f"process {os.getpid()} on {socket.gethostname()}")
        handle.flush()
        yield handle.fileno()


def has_gpu() -> bool:
    """Whether an NVIDIA driver is loaded; asked of the kernel, because torch takes seconds."""
    return any(Path(p).exists() for p in ("/dev/nvidiactl", "/proc/driver/nvidia/version"))


def _deepspeed() -> str:
    beside = Path(sys.executable).with_name("deepspeed")
    found = str(beside) if beside.exists() else shutil.which("deepspeed")
    if found is None:
        raise ConfigError(f"no deepspeed command beside {sys.executable}; pip install deepspeed")
    return found


def _visible(devices: str, config: Config) -> str:
    """The first GPUs of CUDA_VISIBLE_DEVICES, one for each rank."""
    ids = [d for d in devices.split(",") if d.strip()]
    if len(ids) < config.world_size:
        raise ConfigError(
            f"CUDA_VISIBLE_DEVICES={devices} shows {len(ids)} GPUs, the layout needs "
            f"{config.world_size}; show more or lower the degrees of parallel.*"
        )
    if not all(d.strip().isdigit() for d in ids):
        raise ConfigError(f"CUDA_VISIBLE_DEVICES={devices}: DeepSpeed reads numbers only")
    return ",".join(d.strip() for d in ids[: config.world_size])


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def _write_environment_file(plan: Launch, path: Path) -> None:
    """KEY=VALUE lines for DeepSpeed to set on every host, after those the user keeps himself.

    DeepSpeed splits each line at `=` and fails on an empty one.
    """
    lines: dict[str, str] = {}
    for folder in (Path.home(), Path.cwd()):
        own = folder / ".deepspeed_env"
        if own.is_file():
            rows = [row for row in own.read_text().splitlines() if "=" in row]
            lines |= dict(row.split("=", 1) for row in rows)
    variables = {**os.environ, **plan.environment}
    lines |= {k: v for k, v in variables.items() if k.startswith(_FORWARDED) and "\n" not in v}
    path.write_text("".join(f"{k}={v}\n" for k, v in lines.items()))
