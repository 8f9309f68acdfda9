"""`epochal study flops`: parameters and training FLOPs of a configuration, by every convention."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pretrain.cli.output import Json, print_json


def flops(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[OVERRIDES]...", help="GROUP=OPTION or KEY=VALUE, as for train."),
    ] = None,
    config_file: Annotated[
        Path | None,
        typer.Option("--config", help="Saved configuration (RUN/config.yaml) to start from."),
    ] = None,
    vocab_size: Annotated[
        int | None, typer.Option(help="Ids of the tokenizer; default: those of data.tokenizer.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Print parameters and training FLOPs of a token, by every convention side by side.

    `epochal study flops model=25m objective=masked data.seq_length=2048`
    """
    from pretrain.config.compose import compose
    from pretrain.planning.plan import vocabulary

    config = compose(overrides or [], config_file)
    size, assumed = vocabulary(config, vocab_size)
    counted = flops_report(config, size)
    if as_json:
        print_json({**counted, "vocab_size": size, "vocabulary_assumed": assumed})
    else:
        _show(counted, size, assumed)


def flops_report(config: Any, vocab_size: int) -> dict[str, Any]:
    """Sizes and conventions of a configuration as plain values."""
    from pretrain.planning.plan import objective_cost
    from pretrain.study.conventions import Training, report

    cost = objective_cost(config, vocab_size)
    training = Training(
        causal=cost.causal,
        head_share=cost.head_share,
        positions_per_token=cost.positions_per_token,
        extra_passes=cost.extra_passes,
    )
    padded = config.model.padded_vocab_size(vocab_size)
    return {
        "objective": config.objective.name,
        **report(config.model, padded, config.data.seq_length, training),
    }


def _show(counted: dict[str, Any], vocab_size: int, assumed: bool) -> None:
    """Print the sizes, then a line for each convention."""
    note = " (assumed; no tokenizer file)" if assumed else ""
    lines = {
        "objective": counted["objective"],
        "parameters": f"{counted['parameters']:,}",
        "without embeddings": f"{counted['non_embedding_parameters']:,}",
        "vocabulary": f"{vocab_size:,}{note}, {counted['padded_vocab_size']:,} rows",
        "sequence": f"{counted['seq_length']:,} tokens",
    }
    for name, value in lines.items():
        print(f"{name:<20}  {value}")
    print("\ntraining FLOPs of a token\n")
    rows = counted["conventions"]
    width = max(len(row["counts"]) for row in rows)
    for row in rows:
        gigas, share = row["flops_per_token"] / 1e9, 100 * row["relative"]
        print(
            f"{row['name']:<20}  {gigas:>10.5g} G  {share:>5.1f} %  "
            f"{row['counts']:<{width}}  {row['source']}"
        )
