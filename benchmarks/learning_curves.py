"""Learning curves of the objectives on the same tokens: exact bounds against tokens and FLOPs.

    python benchmarks/learning_curves.py --corpus FOLDER [--tokens N] [--families NAME ...]
    python benchmarks/learning_curves.py --draw docs/images/learning.json

Every family trains the same transformer (noise-conditioned ones have their modulation on top) on
the same fresh tokens in the same order, with the same batch and schedule, as a run that `epochal`
can go on with, evaluate and sample. All are measured on the same validation sequences by
their exact bound; the autoregressive likelihood has no noise of its own. A start after an
interruption goes on where it stopped. `--draw` repeats figure and table from stored numbers.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from learning_families import FAMILIES
from record import commit

from cluster.status import read_status
from data_pipeline.corpus.source import SourceSettings
from data_pipeline.prepare.prepare import PreparedData, prepare
from data_pipeline.prepare.settings import PrepareSettings, TokenizerSettings
from pretrain.config.compose import compose, load_config
from pretrain.config.preflight import preflight
from pretrain.config.run import Config
from pretrain.data import clean_batch, training_stream, validation_stream
from pretrain.model.size import parameter_count
from pretrain.training.start import run_ranks

VOCABULARY = 1024
SHARED = (
    "model=tiny",
    "model.qk_norm=true",
    "data.seq_length=64",
    "data.verify=size",
    "optimizer.schedule.warmup=0.05",
    "optimizer.min_lr=3e-4",
    "train.global_batch_size=16",
    "train.log_interval=50",
    "train.checkpoint_interval=500",
    "train.keep_checkpoints=1",
    "parallel=single",
    "parallel.threads_per_rank=1",
    "evaluation.draws=8",
    "evaluation.sequences=256",
    "tracking=jsonl",
)
"""Settings of all runs; the rest are defaults."""
EVALUATIONS = (1 / 16, 1 / 8, 1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4, 7 / 8)
"""Shares of the tokens after which the bound is measured, beside the end."""


def main() -> None:
    """Prepare, train what is missing, write the numbers, draw them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--corpus", default="builtin", help="files or folder of text")
    parser.add_argument("--out", type=Path, default=Path("runs/learning"))
    parser.add_argument("--tokens", type=int, default=6_000_000)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--families", nargs="*", default=list(FAMILIES), choices=FAMILIES)
    parser.add_argument("--draw", type=Path, metavar="JSON", help="only draw these numbers")
    arguments = parser.parse_args()
    if arguments.draw:
        results = json.loads(arguments.draw.read_text())
        draw(results, arguments.draw.with_suffix(".png"))
        print(table(results))
        return
    data = prepare_corpus(arguments.corpus, arguments.out / "pool")
    for name in arguments.families:
        code = train_family(family_config(name, data, arguments))
        if code:
            sys.exit(code)
    results = collect(arguments.out)
    path = arguments.out / "learning.json"
    path.write_text(json.dumps(results, indent=1) + "\n")
    draw(results, path.with_suffix(".png"))
    print(table(results))


def prepare_corpus(corpus: str, out: Path) -> PreparedData:
    """A pool with a vocabulary so small that the head does not dominate a small model."""
    return prepare(
        PrepareSettings(
            out=out,
            sources=(SourceSettings(path=corpus),),
            tokenizer=TokenizerSettings(vocab_size=VOCABULARY, train_bytes=4_000_000),
        )
    )


def family_config(name: str, data: PreparedData, arguments: argparse.Namespace) -> Config:
    """The run of one family: `arguments.tokens` tokens, each seen once."""
    family = FAMILIES[name]
    points = ",".join(f"{share:g}" for share in EVALUATIONS)
    return preflight(
        compose(
            [
                *SHARED,
                f"objective={family.option}",
                *family.overrides,
                f"optimizer.lr={arguments.lr}",
                f"run.name={name}",
                f"run.root={arguments.out / 'runs'}",
                f"data.train={data.train}",
                f"data.validation={data.validation}",
                f"data.tokenizer={data.tokenizer}",
                f"data.unique_tokens={arguments.tokens}",
                f"train.eval_epochs=[{points}]",
            ]
        )
    )


def train_family(config: Config) -> int:
    """Train unless it is done; the exit code."""
    status = read_status(config.run.path)
    if status is not None and status["state"] == "finished":
        print(f"already finished: {config.run.path}")
        return 0
    outcome = run_ranks(config)
    if outcome.message:
        print(f"error: {outcome.message}", file=sys.stderr)
    return outcome.exit_code


def collect(out: Path) -> dict[str, Any]:
    """Settings and evaluations of all runs below `out`; a run under way counts as far as it is."""
    curves: dict[str, Any] = {}
    runs = {name: out / "runs" / name for name in FAMILIES}
    configs = {
        name: load_config(run / "config.yaml")
        for name, run in runs.items()
        if (run / "metrics.jsonl").is_file()
    }
    for name, config in configs.items():
        run = runs[name]
        records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        measured = {
            int(r["train/tokens"]): point(r) for r in records if "validation/nats_per_token" in r
        }
        if not measured:
            continue
        padded = config.model.padded_vocab_size(VOCABULARY)
        curves[name] = {
            "parameters": parameter_count(config.model, padded),
            "lr": config.optimizer.lr,
            "points": list(measured.values()),
        }
    return {
        "commit": commit(),
        "settings": list(SHARED),
        "unigram": unigram(next(iter(configs.values()))),
        "curves": curves,
    }


def unigram(config: Config) -> float:
    """Nats per token of the measured sequences under the frequencies of the training tokens."""
    train, validation = training_stream(config), validation_stream(config)
    tokens = [
        clean_batch(stream.read(np.arange(count))).tokens.flatten().numpy()
        for stream, count in (
            (train, train.total_positions),
            (validation, config.evaluation.sequences or validation.total_positions),
        )
    ]
    counts = np.bincount(tokens[0], minlength=VOCABULARY) + 1.0
    return float(-np.log(counts[tokens[1]] / counts.sum()).mean())


def point(record: dict[str, float]) -> dict[str, float]:
    """One evaluation, in the names of the results."""
    return {
        "tokens": record["train/tokens"],
        "flops": record["train/flops"],
        "nats_per_token": record["validation/nats_per_token"],
        "noise_error": record["validation/noise_error"],
        "standard_error": record["validation/standard_error"],
        "bits_per_byte": record["validation/bits_per_byte"],
    }


def table(results: dict[str, Any]) -> str:
    """Markdown: the last bound of each family, best first."""
    lines = [
        "| family | nats per token | bits per byte | tokens | training FLOPs | parameters |",
        "|---|---|---|---|---|---|",
    ]
    last = {name: curve["points"][-1] for name, curve in results["curves"].items()}
    for name in sorted(last, key=lambda n: last[n]["nats_per_token"]):
        p, curve = last[name], results["curves"][name]
        lines.append(
            f"| {FAMILIES[name].label} | {p['nats_per_token']:.3f} ± {p['noise_error']:.3f} "
            f"| {p['bits_per_byte']:.3f} | {p['tokens'] / 1e6:.2f} M | {p['flops']:.2e} "
            f"| {curve['parameters'] / 1e6:.2f} M |"
        )
    return "\n".join(lines)


def draw(results: dict[str, Any], path: Path) -> None:
    """Bounds with two standard errors of their noise against tokens and against FLOPs."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(1, 2, figsize=(12, 5), sharey=True, layout="constrained")
    for axis, field, scale, label in (
        (axes[0], "tokens", 1e6, "tokens seen (millions)"),
        (axes[1], "flops", 1e12, "training FLOPs (1e12)"),
    ):
        for name, curve in results["curves"].items():
            family, points = FAMILIES[name], curve["points"]
            if not family.drawn:
                continue
            axis.errorbar(
                [p[field] / scale for p in points],
                [p["nats_per_token"] for p in points],
                yerr=[2 * p["noise_error"] for p in points],
                label=family.label,
                color=family.color,
                linestyle=family.style,
                marker="o",
                markersize=3,
                linewidth=1.5,
                capsize=2,
            )
        level = {"label": "frequencies of tokens alone", "color": "gray"}
        axis.axhline(results["unigram"], linestyle=":", linewidth=1, **level)
        axis.set_xlim(left=0)
        axis.set_xlabel(label)
        axis.grid(alpha=0.25, linewidth=0.5)
    axes[0].set_ylabel("validation bound (nats per token)")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    main()
