"""Outcome of `epochal train` for a checked configuration: shown, prepared, or trained."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import typer

from pretrain.cli.output import print_json, print_red

if TYPE_CHECKING:
    from pretrain.config.run import Config


def show_plan(config: Config, as_json: bool) -> None:
    """Print the resolved configuration and the command of its ranks."""
    import yaml

    from pretrain.training.start import plan_run

    launch = plan_run(config)
    values = config.model_dump(mode="json")
    if as_json:
        about = {"command": launch.command, "environment": launch.environment}
        print_json({**about, "ranks": config.world_size, "config": values})
        return
    print(yaml.safe_dump(values, sort_keys=False), end="")
    print(f"\n# {config.world_size} rank(s), {config.num_microbatches} micro-batch(es) a step")
    print(f"# {launch}")


def prepare_run(config: Config, as_json: bool) -> None:
    """Write RUN/config.yaml for ranks that something else starts; print its path."""
    from cluster.folder import starting
    from pretrain.training.start import write_run

    with starting(config.run.path):
        path = write_run(config)
    if as_json:
        print_json({"config": str(path), "world_size": config.world_size})
    else:
        print(path)


def launch_run(config: Config, as_json: bool) -> None:
    """Train, say how it ended and leave with the exit code."""
    from pretrain.training.start import run_ranks

    outcome = run_ranks(config, output=sys.stderr if as_json else None)
    if as_json:
        print_json({"run": str(config.run.path), **outcome.to_dict()})
    elif outcome.state == "finished":
        why = f", {outcome.message}" if outcome.message else ""
        print(f"finished at step {outcome.step:,}{why}; run folder {config.run.path}")
    elif outcome.state == "preempted":
        how = outcome.message or "stopped, saved"
        print(f"{how}; start the same command again to resume {config.run.path}")
    elif outcome.message:
        print_red(f"error: {outcome.message}")
    raise typer.Exit(outcome.exit_code)
