"""`epochal demo`: from raw text to a figure, on real text and without downloads.

The prose of the Python installation is tokenised into a pool; an autoregressive and a masked
diffusion model with the same transformer train on the same small budget of unique tokens, repeated
many times, on two ranks; their exact likelihoods are compared. Finished parts are not repeated, so
that an interrupted demo continues where it stopped.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.status import read_status
from pretrain.config.run import Config
from pretrain.errors import TrainingError
from pretrain.study.curves import Curve, crossing, overtaking, read_curve

if TYPE_CHECKING:
    from data_pipeline.prepare.prepare import PreparedData

FAMILIES = {"autoregressive": "autoregressive", "masked": "masked diffusion"}
"""Objectives and their labels in the figure; the first is the reference."""
VOCABULARY = 2048
VALIDATION_SHARE = 0.05
SAMPLE_STEPS = 64


LEARNING_RATES = {"autoregressive": 1e-3, "masked": 3e-3}
"""Learning rate of each family: the better of 1e-3 and 3e-3 in a shorter run."""


@dataclass(frozen=True)
class Plan:
    """Length of each family's training; other settings are in `configs/runs/demo.yaml`."""

    epochs: dict[str, float]
    eval_epochs: dict[str, list[float]]
    overrides: tuple[str, ...]
    limit: str
    """Time that the whole takes at most."""


SHORT = Plan(
    epochs={"autoregressive": 20, "masked": 28},
    eval_epochs={
        "autoregressive": [1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16],
        "masked": [1, 2, 4, 8, 12, 16, 20, 24],
    },
    # Short convolutions end the plateau of masked diffusion, where it knows token frequencies only.
    overrides=("data.unique_tokens=50000", "model.short_convolution=5"),
    limit="6 minutes",
)
FULL = Plan(
    epochs={"autoregressive": 32, "masked": 88},
    eval_epochs={
        "autoregressive": [1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28],
        "masked": [1, 2, 4, 8, 12, 16, 20, 24, 28, 32, 40, 48, 56, 64, 72, 80],
    },
    overrides=("data.unique_tokens=100000",),
    limit="20 minutes",
)


def run_demo(folder: Path, full: bool) -> int:
    """Everything, in order; returns the exit code. `full` trains longer, on more tokens."""
    started = time.monotonic()
    plan = FULL if full else SHORT
    title = f"Corpus, tokenizer, shards (the whole demo takes at most {plan.limit} on 2 idle cores)"
    _heading(1, title)
    data = prepare_data(folder)
    for number, objective in enumerate(FAMILIES, start=2):
        _heading(number, f"Train {FAMILIES[objective]} on the same tokens")
        code = train_family(folder, objective, plan, data)
        if code:
            return code
    _heading(4, "Compare")
    report = compare(folder)
    _heading(5, "Samples")
    print_samples(folder)
    print(f"\nfigure      {folder / 'figure.png'}")
    print(f"report      {folder / 'report.json'}")
    uri = f"sqlite:///{(folder / 'runs' / 'mlflow.db').resolve()}"
    print(f"MLflow      mlflow ui --backend-store-uri {uri}")
    print(f"\n{report['verdict']}")
    print(f"took {(time.monotonic() - started) / 60:.1f} minutes")
    return 0


def prepare_data(folder: Path) -> PreparedData:
    """Prepare the built-in corpus as a pool below `folder`."""
    from data_pipeline.corpus.source import SourceSettings
    from data_pipeline.prepare.prepare import prepare
    from data_pipeline.prepare.settings import PrepareSettings, TokenizerSettings
    from pretrain.cli.progress import make_progress

    settings = PrepareSettings(
        out=folder / "data",
        sources=(SourceSettings(path="builtin", license="PSF-2.0"),),
        tokenizer=TokenizerSettings(model_type="bpe", vocab_size=VOCABULARY),
        validation_fraction=VALIDATION_SHARE,
    )
    with make_progress(quiet=False) as progress:
        data = prepare(settings, progress)
    for split, pool in data.report["pools"].items():
        print(
            f"{split:<11} {pool['documents']:>5,} documents  {pool['tokens']:>9,} tokens  "
            f"{pool['bytes_per_token']:.2f} bytes a token"
        )
    return data


def family_config(folder: Path, objective: str, plan: Plan, data: PreparedData) -> Config:
    """Compose the configuration of one family's run."""
    from pretrain.config.compose import compose
    from pretrain.config.preflight import preflight

    points = ",".join(f"{epoch:g}" for epoch in plan.eval_epochs[objective])
    return preflight(
        compose(
            [
                "runs=demo",
                f"objective={objective}",
                *(["objective.loss=simple"] if objective == "masked" else []),
                f"optimizer.lr={LEARNING_RATES[objective]}",
                f"optimizer.min_lr={LEARNING_RATES[objective] / 10}",
                f"run.name={objective}",
                f"run.root={folder / 'runs'}",
                f"data.train={data.train}",
                f"data.validation={data.validation}",
                f"data.tokenizer={data.tokenizer}",
                f"data.epochs={plan.epochs[objective]:g}",
                f"train.eval_epochs=[{points}]",
                *plan.overrides,
            ]
        )
    )


def train_family(folder: Path, objective: str, plan: Plan, data: PreparedData) -> int:
    """Train one family unless it is finished; return the exit code."""
    from pretrain.training.start import run_ranks

    config = family_config(folder, objective, plan, data)
    status = read_status(config.run.path)
    if status is not None and status["state"] == "finished":
        print(f"already finished at step {status['step']:,} in {config.run.path}")
        return 0
    outcome = run_ranks(config)
    if outcome.message:
        print(f"error: {outcome.message}", file=sys.stderr)
    return outcome.exit_code


def compare(folder: Path) -> dict[str, Any]:
    """Make figure, table and verdict from the logs of the runs; write `report.json`."""
    from pretrain.study.figures.comparison import draw_comparison

    curves = [read_curve(folder / "runs" / name, label) for name, label in FAMILIES.items()]
    if not all(curve.points for curve in curves):
        raise TrainingError(f"the runs below {folder / 'runs'} hold no evaluation; remove {folder}")
    reference, challenger = curves
    config = json.loads((folder / "data" / "report.json").read_text())
    figures = draw_comparison(
        reference,
        challenger,
        _title(folder),
        folder / "figure",
    )
    rows = [_row(curve) for curve in curves]
    _print_table(rows)
    report = {
        "rows": rows,
        "verdict": verdict(reference, challenger),
        "validation_tokens": config["pools"]["validation"]["tokens"],
    }
    (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    _log_artifacts(folder, [*figures, folder / "report.json"])
    return report


def verdict(reference: Curve, challenger: Curve) -> str:
    """State the measured results in one or two sentences, without interpretation."""
    best, point = reference.best, crossing(challenger, reference)
    turn = (
        f"The {reference.label} model is best at epoch {best.epoch:.0f} "
        f"({best.nats_per_token:.3f} nats per token) and overfits from there on."
        if reference.overfits
        else f"The {reference.label} model reached {best.nats_per_token:.3f} nats per token and "
        "did not measurably overfit."
    )
    if point is not None:
        return (
            f"{turn} From epoch {point.epoch:.0f} on the bound of {challenger.label} lies below "
            f"that ({challenger.best.nats_per_token:.3f} at its best)."
        )
    gap = challenger.best.nats_per_token - best.nats_per_token
    text = (
        f"{turn} {challenger.label.capitalize()} did not cross that best value within "
        f"{challenger.points[-1].epoch:.0f} epochs: its bound stays {gap:.3f} nats per token above."
    )
    overtaken = overtaking(challenger, reference)
    if overtaken is not None:
        text += (
            f" Without early stopping it is better from epoch {overtaken.epoch:.0f} on "
            f"({overtaken.flops:.1e} FLOPs), where the {reference.label} model has overfitted."
        )
    return text


def print_samples(folder: Path) -> None:
    """Print two samples of each family, which are also stored in the run folders."""
    from pretrain.cli.output import visible
    from pretrain.config.samplers import samplers
    from pretrain.sampling.run import sample_run

    settings = samplers.make("ancestral", steps=SAMPLE_STEPS, top_p=0.9)

    for objective, label in FAMILIES.items():
        samples = sample_run(folder / "runs" / objective, settings, num=2, seed=0)
        for drawn in samples:
            print(
                f"--- {label}, sample {drawn['index']} ({drawn['sampler']}, nucleus 0.9, seed 0, "
                f"{drawn['network_evaluations']} forward passes)\n{visible(drawn['text'])}\n"
            )


def _title(folder: Path) -> str:
    from pretrain.config.compose import load_config
    from pretrain.model.size import parameter_count

    config = load_config(folder / "runs" / "masked" / "config.yaml")
    parameters = parameter_count(config.model, config.model.padded_vocab_size(VOCABULARY))
    return (
        f"{config.data.unique_tokens:,} unique tokens, repeated; the same transformer "
        f"({parameters / 1e6:.1f} M parameters)"
    )


def _row(curve: Curve) -> dict[str, Any]:
    best, last = curve.best, curve.points[-1]
    return {
        "family": curve.label,
        "best_nats_per_token": best.nats_per_token,
        "noise_error": best.noise_error,
        "best_bits_per_byte": best.bits_per_byte,
        "best_epoch": best.epoch,
        "flops_at_best": best.flops,
        "last_nats_per_token": last.nats_per_token,
        "last_epoch": last.epoch,
    }


def _print_table(rows: list[dict[str, Any]]) -> None:
    print(
        f"{'':<18}{'best nats/token':>20}{'bits/byte':>11}{'at epoch':>10}{'FLOPs':>10}"
        f"{'last nats/token':>17}{'at epoch':>10}"
    )
    for row in rows:
        best = f"{row['best_nats_per_token']:.3f} ± {row['noise_error']:.3f}"
        print(
            f"{row['family']:<18}{best:>20}{row['best_bits_per_byte']:>11.3f}"
            f"{row['best_epoch']:>10.0f}{row['flops_at_best']:>10.1e}"
            f"{row['last_nats_per_token']:>17.3f}{row['last_epoch']:>10.0f}"
        )
    print("± is the standard error of the bound's noise draws; AR's likelihood is exact.")


def _log_artifacts(folder: Path, paths: list[Path]) -> None:
    """Attach files to the runs in MLflow; a tracker that fails costs only a warning."""
    from pretrain.config.compose import load_config

    try:
        for objective in FAMILIES:
            run = folder / "runs" / objective
            config = load_config(run / "config.yaml")
            (settings,) = config.tracking.services
            tracked = settings.load()(settings, config, run, True)
            tracked.connect()
            for path in paths:
                tracked.log_artifact(path, "comparison")
            tracked.end("finished")
    except Exception as error:  # the figure lies in the folder either way
        print(f"warning: the figure was not logged to MLflow ({error})", file=sys.stderr)


def _heading(number: int, text: str) -> None:
    print(f"\n[{number}/5] {text}", flush=True)
