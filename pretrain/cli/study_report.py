"""`epochal study report`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from pretrain.cli.output import Json, print_json


def report(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="Folder of a study, or of its table.csv.")
    ],
    resamples: Annotated[
        int, typer.Option(min=0, help="Bootstrap resamples of each law; 0 gives no intervals.")
    ] = 100,
    as_json: Json = False,
) -> None:
    """Write DIR/report: a page that needs no network, every figure as PNG, SVG and CSV, the fits.

    `epochal study report studies/crossover_cpu`
    """
    from pretrain.study.report.build import log_report, write_report

    written = write_report(folder, resamples=resamples)
    failed = log_report(folder, written)
    if failed:
        print(f"warning: the report was not logged to MLflow ({failed})", file=sys.stderr)
    if as_json:
        print_json(
            {
                "page": str(written.page),
                "bytes": written.bytes,
                "fits": str(written.fits),
                "figures": [str(path) for path in written.figures],
                "omitted": list(written.omitted),
            }
        )
        return
    print(f"{written.page}  ({written.bytes / 1e6:.1f} MB, {len(written.figures) // 3} figures)")
    for reason in written.omitted:
        print(f"not drawn: {reason}")
