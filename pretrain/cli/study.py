"""`epochal study`: studies."""

from __future__ import annotations

import typer

from pretrain.cli.study_advise import advise

app = typer.Typer(name="study", help="Scaling studies.", no_args_is_help=True)
app.command()(advise)


@app.callback()
def study() -> None:
    """Scaling studies."""
