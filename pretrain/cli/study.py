"""`epochal study`: grids of runs, planned, executed and collected."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pretrain.cli.output import Json, print_json
from pretrain.cli.study_advise import advise
from pretrain.cli.study_flops import flops
from pretrain.cli.study_report import report
from pretrain.cli.study_worth import worth

if TYPE_CHECKING:
    from pretrain.study.runner.planned import Planned
    from pretrain.study.runner.settings import Study

app = typer.Typer(
    name="study", help="Grids of runs: from a YAML file to laws and a report.", no_args_is_help=True
)

File = Annotated[
    str, typer.Argument(help="YAML file, a name of configs/study, or the folder of a study.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[OVERRIDES]...", help="KEY=VALUE for every run, e.g. the data."),
]
Folder = Annotated[
    Path | None, typer.Option("--dir", help="Folder of the study; default: studies/NAME.")
]


class Source(StrEnum):
    """Places that a table is collected from."""

    folders = "folders"
    mlflow = "mlflow"


@app.callback()
def study() -> None:
    """Grids of runs: from a YAML file to a table."""


@app.command()
def plan(
    file: File,
    overrides: Overrides = None,
    folder: Folder = None,
    machine: Annotated[
        str | None, typer.Option(help="A name of configs/machine, or a file: GPU-hours on it.")
    ] = None,
    gpus: Annotated[
        int | None, typer.Option(min=1, help="GPUs that work at the same time: days.")
    ] = None,
    price_per_gpu_hour: Annotated[float | None, typer.Option(help="Price of a GPU-hour.")] = None,
    flops_per_second: Annotated[
        float | None,
        typer.Option(help="Counted FLOPs a second of one run here; default: of finished runs."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Check every run of a study and count its cost, before anything starts.

    `epochal study plan crossover --machine h100x8 --gpus 8`
    """
    from pretrain.cli.study_plan import show_costs

    loaded, place = load(file, overrides, folder)
    show_costs(
        loaded,
        planned(loaded, place),
        machine=machine,
        gpus=gpus,
        price=price_per_gpu_hour,
        flops_per_second=flops_per_second,
        as_json=as_json,
    )


@app.command()
def run(
    file: File,
    overrides: Overrides = None,
    folder: Folder = None,
    jobs: Annotated[
        int | None,
        typer.Option(min=1, help="Runs at once; default: the study's, else what fits."),
    ] = None,
    only: Annotated[
        str | None, typer.Option(help="Runs whose name has this text or fits this pattern.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option(help="Check everything, show what would run, start nothing.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Execute the runs of a study on this machine; the same command resumes.

    `epochal study run crossover_cpu data.train=data/pool/train/manifest.json --jobs 2`

    Exit codes: 0 all runs are done, 75 stopped by a signal after saving, 2 study or configuration,
    5 runs failed (the others were finished).
    """
    from pretrain.cli.study_run import run_study

    loaded, place = load(file, overrides, folder)
    raise typer.Exit(run_study(loaded, place, jobs, only, dry_run=dry_run, as_json=as_json))


@app.command()
def status(file: File, folder: Folder = None, as_json: Json = False) -> None:
    """Show how far each run of a study is.

    `epochal study status studies/crossover_cpu`
    """
    from pretrain.cli.study_run import show_status
    from pretrain.study.runner.record import FACTS

    place = Path(file)
    if not (place / FACTS).exists():
        place = load(file, None, folder)[1]
    show_status(place, as_json)


@app.command()
def collect(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a study.")],
    source: Annotated[
        Source, typer.Option("--from", help="Where measurements are read.")
    ] = Source.folders,
    out: Annotated[
        Path | None, typer.Option(help="OUT.csv and OUT.parquet; default: DIR/table.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write the tidy table of a study: a row for each evaluation, as CSV and Parquet.

    `epochal study collect studies/crossover_cpu`
    """
    from pretrain.study.runner.collect import collect as gather
    from pretrain.study.runner.collect import write_table
    from pretrain.study.runner.publish import publish

    table = gather(folder, source.value)
    paths = write_table(table, out or folder / "table")
    if (problem := publish(folder, paths)) is not None:
        print(f"warning: MLflow did not take the table: {problem}", file=sys.stderr)
    if as_json:
        print_json({"rows": len(table), "files": [str(path) for path in paths]})
        return
    print(f"{len(table):,} evaluations of {table['run'].nunique():,} runs")
    for path in paths:
        print(path)


def load(file: str, overrides: list[str] | None, folder: Path | None) -> tuple[Study, Path]:
    """Study of a file and the folder of its runs."""
    from pretrain.study.runner.settings import FILE, find_study, read_study

    path = find_study(file)
    loaded = read_study(path, overrides or [])
    begun = path.parent if path.name == FILE and (path.parent / "study.json").exists() else None
    return loaded, folder or begun or Path("studies") / loaded.name


def planned(loaded: Study, place: Path) -> list[Planned]:
    """Checked runs of a study."""
    from pretrain.study.runner.planned import plan_runs

    return plan_runs(loaded, place)


app.command()(report)
app.command()(advise)
app.command()(worth)
app.command()(flops)
