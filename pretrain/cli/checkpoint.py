"""`epochal export` and `epochal reshard`, the commands on checkpoints."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from pretrain.cli.output import Json, print_json, print_values

Place = Annotated[Path, typer.Argument(help="Run folder (its newest checkpoint) or a checkpoint.")]


class WeightsKind(StrEnum):
    """Kinds of weights in a checkpoint."""

    ema = "ema"
    raw = "raw"


class Dtype(StrEnum):
    """Data types of exported weights."""

    float32 = "float32"
    bfloat16 = "bfloat16"


Weights = Annotated[
    WeightsKind | None,
    typer.Option(help="Averaged or last weights; default: averaged ones where there are any."),
]


def export(
    place: Place,
    out: Annotated[Path, typer.Argument(help="File to write, NAME.safetensors.")],
    weights: Weights = None,
    dtype: Annotated[Dtype, typer.Option(help="Type of the tensors.")] = Dtype.float32,
    as_json: Json = False,
) -> None:
    """Write a run's weights into one safetensors file, from any layout.

    `epochal export runs/masked masked.safetensors --dtype bfloat16`

    Another run starts from it with `epochal train ... run.init_from=masked.safetensors`.
    """
    from pretrain.checkpoints import export_checkpoint

    result = export_checkpoint(
        place, out, weights=None if weights is None else weights.value, dtype=dtype.value
    )
    _print(result, as_json)


def reshard(
    place: Place,
    to: Annotated[
        Path | None,
        typer.Option(help="Folder of the copy, which is DIR/step-...; without it only verify."),
    ] = None,
    weights_only: Annotated[bool, typer.Option(help="Leave out the optimizer state.")] = False,
    files: Annotated[
        int | None, typer.Option(min=1, help="Number of files for the optimizer state.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Verify a checkpoint; with --to write a copy with the same tensors in other files.

    To resume a run in another layout needs no resharding: change `parallel.*` and start it again.

    `epochal reshard runs/masked`

    `epochal reshard runs/masked --to /archive/masked --weights-only`
    """
    from pretrain.checkpoints import reshard as run_reshard

    _print(run_reshard(place, to, weights_only=weights_only, files=files), as_json)


def _print(values: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(values)
    else:
        print_values(values)
