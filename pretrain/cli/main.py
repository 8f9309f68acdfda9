"""`epochal`: the commands. Each imports its modules when it runs, so that help appears at once.

Errors that carry an exit code are printed as one red line, or as JSON under `--json`; anything else
is a bug and keeps its traceback.
"""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from cluster.terminal import outlive_terminal
from pretrain import __version__
from pretrain.cli.checkpoint import Weights, export, reshard
from pretrain.cli.data import app as data_app
from pretrain.cli.output import Json, print_error, print_json, print_values, visible
from pretrain.cli.plan import plan
from pretrain.cli.start import launch_run, prepare_run, show_plan
from pretrain.cli.study import app as study_app
from pretrain.cli.track import app as track_app

app = typer.Typer(
    name="epochal",
    help="Pretrain autoregressive and diffusion language models on a fixed set of repeated tokens.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(data_app)
app.add_typer(track_app)
app.add_typer(study_app)

Run = Annotated[Path, typer.Argument(help="Run folder, e.g. runs/autoregressive.")]
Checkpoint = Annotated[
    Path | None, typer.Option(help="Checkpoint folder; default: the newest of the run.")
]


class Split(StrEnum):
    """Pools of a run that can be evaluated."""

    validation = "validation"
    train = "train"


@app.callback(invoke_without_command=True)
def epochal(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Pretrain autoregressive and diffusion language models on a fixed set of repeated tokens."""
    if version:
        print(__version__)
        raise typer.Exit


@app.command()
def train(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[OVERRIDES]...", help="GROUP=OPTION or KEY=VALUE, in any order."),
    ] = None,
    config_file: Annotated[
        Path | None,
        typer.Option("--config", help="Saved configuration (RUN/config.yaml) to start from."),
    ] = None,
    tracking_uri: Annotated[
        str | None, typer.Option(help="MLflow server; default: runs/mlflow.db.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option(help="Check everything, show what would run, start nothing.")
    ] = False,
    prepare: Annotated[
        bool,
        typer.Option(help="Check everything and write RUN/config.yaml; srun starts the ranks."),
    ] = False,
    world_size: Annotated[
        int | None,
        typer.Option(min=1, help="With --prepare: number of ranks that will be started."),
    ] = None,
    multirun: Annotated[
        bool, typer.Option("--multirun", help="One run for each value: optimizer.lr=1e-3,3e-3.")
    ] = False,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="With --multirun: runs at once; default: what fits.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Train a model; start the same command again to resume.

    `epochal train model=tiny objective=masked data.unique_tokens=100000 data.epochs=20`

    `epochal train --config runs/masked/config.yaml data.epochs=40`

    `epochal train --multirun objective=autoregressive,masked optimizer.lr=1e-3,3e-3`

    Exit codes: 0 finished, 75 stopped by a signal after saving, 2 configuration, 3 shards,
    4 checkpoint, 5 training or saving failed, 6 ranks died.
    """
    from pretrain.config.compose import compose, replace_values
    from pretrain.config.preflight import preflight

    if multirun:
        from pretrain.cli.study_run import run_sweep

        alone = {"--config": config_file, "--prepare": prepare or None, "--world-size": world_size}
        if tracking_uri is not None:
            overrides = [
                *(overrides or []),
                f"tracking.uri='{tracking_uri}'",
                "tracking.mlflow=true",
            ]
        raise typer.Exit(run_sweep(overrides or [], jobs, alone, dry_run=dry_run, as_json=as_json))
    config = compose(overrides or [], config_file)
    if tracking_uri is not None:
        config = replace_values(config, {"tracking.uri": tracking_uri, "tracking.mlflow": True})
    config = preflight(config, world_size)
    if dry_run:
        from pretrain.training.rehearsal import rehearse

        rehearse(config)
        show_plan(config, as_json)
    elif prepare:
        prepare_run(config, as_json)
    else:
        launch_run(config, as_json)


@app.command()
def evaluate(
    run: Run,
    checkpoint: Checkpoint = None,
    weights: Weights = None,
    draws: Annotated[
        int | None, typer.Option(help="Noise levels per sequence; default: the run's.")
    ] = None,
    sequences: Annotated[
        int | None, typer.Option(help="Number of sequences, from the first; default: the run's.")
    ] = None,
    split: Annotated[Split, typer.Option(help="Pool to evaluate on.")] = Split.validation,
    as_json: Json = False,
) -> None:
    """Evaluate the likelihood bound of a run's model, with its standard error.

    `epochal evaluate runs/masked --draws 32`
    """
    from pretrain.evaluation.run import evaluate_run

    result = evaluate_run(
        run,
        checkpoint=checkpoint,
        weights=None if weights is None else weights.value,
        draws=draws,
        sequences=sequences,
        split=split.value,
    )
    if as_json:
        print_json(result)
    else:
        print_values(result)


@app.command()
def sample(
    run: Run,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="sampler=NAME chooses a sampler, sampler.KEY=VALUE sets a value."),
    ] = None,
    checkpoint: Checkpoint = None,
    weights: Weights = None,
    num: Annotated[int, typer.Option(help="Number of samples.")] = 4,
    steps: Annotated[
        int | None, typer.Option(help="Denoising steps; default: one a token. Diffusion only.")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help="1 (default) samples the model itself, 0 is greedy.")
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(help="Nucleus: smallest set of tokens with this mass; default 1."),
    ] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same samples.")] = 0,
    prompt: Annotated[str, typer.Option(help="Text that every sample begins with.")] = "",
    greedy_tail: Annotated[
        bool,
        typer.Option("--greedy-tail", help="Take the mode in the last step (uniform families)."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Draw text from a run's model.

    `epochal sample runs/masked --num 2 --steps 64 --prompt "The interpreter"`
    """
    from pretrain.config.compose import compose_component
    from pretrain.config.samplers import samplers

    given = {"steps": steps, "temperature": temperature, "top_p": top_p}
    values: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    values |= {"greedy_tail": True} if greedy_tail else {}
    settings = compose_component(samplers, overrides or [], values)
    from pretrain.sampling.prompt import TRAILING_SPACE, without_trailing_space
    from pretrain.sampling.run import sample_run

    if without_trailing_space(prompt) != prompt:
        print(f"note: {TRAILING_SPACE}", file=sys.stderr)
    samples = sample_run(
        run,
        settings,
        checkpoint=checkpoint,
        weights=None if weights is None else weights.value,
        num=num,
        seed=seed,
        prompt=prompt,
    )
    if as_json:
        print_json(samples)
        return
    for drawn in samples:
        about = f"{drawn['sampler']}, seed {drawn['seed']}, {drawn['network_evaluations']} passes"
        print(f"--- sample {drawn['index']} ({about})\n{visible(drawn['text'])}\n")


app.command()(export)
app.command()(reshard)


@app.command()
def demo(
    full: Annotated[bool, typer.Option("--full", help="20 minutes instead of 5.")] = False,
    folder: Annotated[Path, typer.Option("--dir", help="Folder of all results.")] = Path("demo"),
) -> None:
    """Make a figure from raw text: AR and masked diffusion on the same repeated tokens.

    `epochal demo`
    """
    from pretrain.cli.demo import run_demo

    raise typer.Exit(run_demo(folder, full))


app.command()(plan)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Check this machine: versions, devices, disk, process groups.

    `epochal doctor`
    """
    from pretrain.cli.doctor import examine

    findings = examine()
    if as_json:
        print_json([finding.to_dict() for finding in findings])
    else:
        for finding in findings:
            mark = {"ok": "ok  ", "note": "note", "bad": "BAD "}[finding.level]
            print(f"{mark}  {finding.what}: {finding.found}")
            if finding.advice:
                print(f"      {finding.advice}")
    raise typer.Exit(1 if any(f.level == "bad" for f in findings) else 0)


def main() -> None:
    """Entry point of the `epochal` command."""
    outlive_terminal()
    try:
        app()
    except Exception as error:
        code = getattr(error, "exit_code", None)
        if code is None:
            raise
        print_error(error, int(code))
        sys.exit(int(code))
