"""`epochal plan`: memory, time and cost of a layout, and better ones; needs no GPU and no data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pretrain.cli.amounts import parse_amount
from pretrain.cli.output import Json, print_json

_RANKS = "parallel.data_parallel_size"


def plan(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[OVERRIDES]...", help="GROUP=OPTION or KEY=VALUE, as for train."),
    ] = None,
    config_file: Annotated[
        Path | None,
        typer.Option("--config", help="Saved configuration (RUN/config.yaml) to start from."),
    ] = None,
    machine: Annotated[
        str, typer.Option(help="A name of configs/machine, or a YAML file like those.")
    ] = "h100x8",
    gpus: Annotated[
        int | None, typer.Option(help="Number of GPUs; default: all of the machine.")
    ] = None,
    tokens: Annotated[
        str | None, typer.Option(help="Tokens to train on (300B, 1.5T): days and GPU-hours.")
    ] = None,
    price_per_gpu_hour: Annotated[
        float | None, typer.Option(help="Price of a GPU-hour: cost of those tokens.")
    ] = None,
    vocab_size: Annotated[
        int | None, typer.Option(help="Ids of the tokenizer; default: those of data.tokenizer.")
    ] = None,
    top: Annotated[int, typer.Option(help="Number of best layouts to show.")] = 5,
    models: Annotated[
        bool, typer.Option("--models", help="Print the table of all packaged models instead.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Memory, step time and cost of a layout before anything runs, and the best layouts.

    `epochal plan model=1.7b train.precision=bfloat16 --machine h100x64 --tokens 1T`
    """
    from pretrain.config.compose import compose, replace_values
    from pretrain.errors import ConfigError
    from pretrain.planning.plan import plan as estimate
    from pretrain.planning.report import to_dict
    from pretrain.planning.tables import sections, show

    if models:
        from pretrain.planning.ladder import ladder_table

        print(ladder_table())
        return
    if top < 0:
        raise ConfigError(f"--top is {top}; it must be 0 or more")
    config = compose(overrides or [], config_file)
    if config_file is not None and not any(word.startswith(_RANKS) for word in overrides or []):
        # A saved configuration records the ranks that its run found, on another machine than this.
        config = replace_values(config, {_RANKS: None})
    planned = estimate(
        config,
        machine=machine,
        num_gpus=gpus,
        tokens=parse_amount("--tokens", tokens) if tokens is not None else None,
        price=price_per_gpu_hour,
        vocab_size=vocab_size,
    )
    if as_json:
        print_json(to_dict(planned, top))
    else:
        show(sections(planned, top))
