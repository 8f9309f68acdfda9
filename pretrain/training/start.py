"""The start of a run: write its configuration and hand its ranks to `cluster`.

Everything that must be known of a `Config` to start ranks is decided here; `cluster` gets plain
values.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import IO

from cluster.errors import LaunchError
from cluster.folder import starting
from cluster.hosts import read_hostfile
from cluster.launch import Job, Launch, launch, plan_launch
from cluster.machine import cores, has_gpu, is_this_machine
from cluster.outcome import Outcome
from cluster.status import forget_statements
from pretrain.config.compose import load_config, save_config
from pretrain.config.run import Config
from pretrain.config.secrets import holds_secret, redacted
from pretrain.training.compiler_cache import (
    VARIABLE,
    adopt,
    compilation_failed,
    fresh_cache,
)

MODULE = "pretrain.train"
"""Program of every rank."""


def plan_run(config: Config, environ: Mapping[str, str] | None = None) -> Launch:
    """Launch of a checked configuration; raises ClusterError where none is possible."""
    environ = os.environ if environ is None else environ
    slots = {} if config.parallel.hostfile is None else read_hostfile(config.parallel.hostfile)
    here = is_this_machine(tuple(slots))
    on_cpu = config.run.device == "cpu" or (config.run.device == "auto" and not has_gpu())
    environment = {}
    if on_cpu and not here:
        environment["DS_ACCELERATOR"] = "cpu"  # DeepSpeed's launcher asks for it, ranks do not
    if "OMP_NUM_THREADS" not in environ or config.parallel.threads_per_rank is not None:
        ranks_here = config.world_size if here else max(slots.values())
        threads = config.parallel.threads_per_rank or max(1, cores() // ranks_here)
        environment["OMP_NUM_THREADS"] = str(threads)
    job = Job(
        module=MODULE,
        arguments=["--config", str(config.run.path / "config.yaml")],
        folder=config.run.path,
        ranks=config.world_size,
        environment=environment,
        on_gpus=not on_cpu,
        hostfile=config.parallel.hostfile,
    )
    return plan_launch(job, environ)


def run_ranks(config: Config, *, output: IO[str] | None = None) -> Outcome:
    """Train a checked configuration to its end, its failure or a signal; see `Outcome`.

    `output` takes what the ranks print (default: this process's standard output). Raises
    ClusterError when the run folder is in use or the ranks cannot be started.
    """
    plan = plan_run(config)
    with starting(config.run.path):
        write_run(config)
        outcome = launch(plan, output=output)
        if compilation_failed(outcome):
            outcome = _run_with_fresh_cache(config, plan, outcome, output)
    if outcome.exit_code == LaunchError.exit_code:
        advice = "if memory ran out, lower train.micro_batch_size"
        return replace(outcome, message=f"{outcome.message}; {advice}")
    return outcome


def _run_with_fresh_cache(
    config: Config, plan: Launch, failed: Outcome, output: IO[str] | None
) -> Outcome:
    """Start the ranks once more where torch could not compile: its cache may be damaged."""
    fresh = fresh_cache()
    text = failed.message.partition("\n")[0]
    print(
        f"warning: torch could not compile ({text}); once more with a fresh cache, {fresh}",
        file=output or sys.stdout,
        flush=True,
    )
    forget_statements(config.run.path)
    again = replace(plan, environment={**plan.environment, VARIABLE: str(fresh)})
    outcome = launch(again, output=output)
    if VARIABLE not in os.environ and not compilation_failed(outcome):
        adopt(fresh)
    return outcome


def write_run(config: Config) -> Path:
    """Write RUN/config.yaml, keeping an earlier, different one as config.N.yaml; the path.

    Statements of an earlier attempt about its end are removed.
    """
    path = config.run.path / "config.yaml"
    forget_statements(path.parent)
    if path.exists():
        earlier = path.read_text()
        if load_config(path) == config and not holds_secret(earlier):
            return path
        taken = [
            int(number)
            for p in path.parent.glob("config.*.yaml")
            if (number := p.name.split(".")[1]).isdecimal()
        ]
        path.with_name(f"config.{max(taken, default=0) + 1}.yaml").write_text(redacted(earlier))
    save_config(config, path)
    return path
