"""Execution of a study from the command line, and the state of its runs as a table."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pretrain.cli.output import print_json, print_red
from pretrain.errors import ConfigError
from pretrain.study.runner.display import make_display, row
from pretrain.study.runner.planned import Planned, plan_runs, select
from pretrain.study.runner.record import read_record, removed_runs, write_record
from pretrain.study.runner.settings import Study
from pretrain.study.runner.state import Progress, read_progress


def run_study(
    study: Study,
    folder: Path,
    jobs: int | None,
    only: str | None,
    *,
    dry_run: bool,
    as_json: bool,
) -> int:
    """Check every run, execute what is not done, say how it ended; returns the exit code."""
    from pretrain.study.runner.execute import execute, holding
    from pretrain.study.runner.executor import LocalExecutor

    runs = plan_runs(study, folder)
    chosen = select(runs, only)
    executor = LocalExecutor(chosen, jobs or study.parallel_runs)
    if dry_run:
        _show_waiting(chosen, folder, executor.jobs, as_json)
        return 0
    with holding(folder):
        write_record(folder, study, runs)
        for name in removed_runs(folder, runs):
            print(f"{name} is no run of the study any more; its folder is left", flush=True)
        with make_display(chosen, quiet=as_json) as display:
            summary = execute(chosen, executor, display)
    if as_json:
        print_json({"study": str(folder), **summary.__dict__, "exit_code": summary.exit_code})
        return summary.exit_code
    for name, message in sorted(summary.failed.items()):
        print_red(f"failed: {folder / 'runs' / name}: {message}")
    if summary.left:
        print(f"{len(summary.left)} runs are left; start the same command again to resume")
    print(f"{len(summary.done)} of {len(chosen)} runs are done; `epochal study collect {folder}`")
    return summary.exit_code


def run_sweep(
    overrides: list[str],
    jobs: int | None,
    refused: Mapping[str, object],
    *,
    dry_run: bool,
    as_json: bool,
) -> int:
    """Execute `epochal train --multirun`; `refused` are options that it does not take, if given."""
    from pretrain.study.runner.multirun import multirun_study

    given = [name for name, value in refused.items() if value is not None]
    if given:
        raise ConfigError(
            f"{given[0]} cannot be given with --multirun, which starts the ranks of several runs; "
            "leave one of the two out"
        )
    study, folder = multirun_study(overrides)
    return run_study(study, folder, jobs, None, dry_run=dry_run, as_json=as_json)


def show_status(folder: Path, as_json: bool) -> None:
    """Print the state of every run of the study in a folder."""
    record = read_record(folder)
    found = {facts.run: read_progress(folder / "runs" / facts.run) for facts in record.runs}
    if as_json:
        print_json({"study": record.name, "runs": [_plain(n, p) for n, p in found.items()]})
        return
    rows = [row(facts, found[facts.run]) for facts in record.runs]
    _print_rows([("run", "state", "step", "loss, validation", "tokens/s"), *rows])
    done = sum(progress.done for progress in found.values())
    print(f"\n{done} of {len(found)} runs are done")


def _show_waiting(runs: list[Planned], folder: Path, jobs: int, as_json: bool) -> None:
    found = {run.name: read_progress(run.folder) for run in runs}
    if as_json:
        print_json(
            {"study": str(folder), "jobs": jobs, "runs": [_plain(*p) for p in found.items()]}
        )
        return
    rows = [row(run.facts, found[run.name]) for run in runs]
    _print_rows([("run", "state", "step", "loss, validation", "tokens/s"), *rows])
    left = sum(not progress.done for progress in found.values())
    print(f"\n{left} of {len(runs)} runs would be started in {folder}, {jobs} at a time")


def _plain(name: str, progress: Progress) -> dict[str, object]:
    return {"run": name, **progress.__dict__}


def _print_rows(rows: list[tuple[str, ...]]) -> None:
    widths = [max(len(cells[i]) for cells in rows) for i in range(len(rows[0]))]
    for cells in rows:
        padded = (f"{cell:<{width}}" for cell, width in zip(cells, widths, strict=True))
        print("  ".join(padded).rstrip())
