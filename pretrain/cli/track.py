"""`epochal track`: what services know of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pretrain.cli.output import Json, print_json

app = typer.Typer(name="track", help="Send measurements of runs to MLflow.", no_args_is_help=True)


@app.callback()
def track() -> None:
    """Send measurements of runs to MLflow."""


@app.command()
def sync(
    run: Annotated[Path, typer.Argument(help="Run folder, e.g. runs/autoregressive.")],
    tracking_uri: Annotated[
        str | None, typer.Option(help="MLflow server; default: the run's.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Send what the services of a run lack of its metrics.jsonl; nothing is sent twice.

    `epochal track sync runs/masked`
    """
    from pretrain.tracking.sync import sync_run

    done = sync_run(run, tracking_uri)
    if as_json:
        print_json(done)
        return
    for service in done:
        print(
            f"{service['service']} at {service['address']}: {service['sent']:,} of "
            f"{service['recorded']:,} measurements sent"
        )
    if not done:
        print(f"{run} has no tracker; metrics.jsonl is its record")
