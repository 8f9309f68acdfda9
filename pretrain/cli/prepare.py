"""`epochal data prepare`: its options, and what it says at the end."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pretrain.cli.output import Json, print_json


def prepare(
    context: typer.Context,
    sources: Annotated[
        list[str] | None,
        typer.Argument(
            help="Text, JSON lines or Parquet files, folders of them, `hf:NAME`, or `builtin` (the "
            "text of the Python installation, the default)."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for tokenizer and pools; default: data/pool, data/builtin for `builtin`."
        ),
    ] = None,
    settings: Annotated[
        Path | None, typer.Option(help="YAML file with all settings, instead of the options.")
    ] = None,
    vocab_size: Annotated[int, typer.Option(help="Ids of the tokenizer to train.")] = 32000,
    model_type: Annotated[str, typer.Option(help="`unigram` or `bpe`.")] = "unigram",
    tokenizer: Annotated[
        Path | None, typer.Option(help="Existing tokenizer file, instead of training one.")
    ] = None,
    validation_fraction: Annotated[
        float, typer.Option(help="Share of documents kept for validation.")
    ] = 0.01,
    near_duplicates: Annotated[
        float | None,
        typer.Option(help="Drop documents this similar (Jaccard, e.g. 0.8); default: keep them."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Key of the document order.")] = 17,
    text_field: Annotated[str, typer.Option(help="Field that holds the text.")] = "text",
    id_field: Annotated[str, typer.Option(help="Field that holds a document's id.")] = "id",
    chunk_characters: Annotated[
        int, typer.Option(help="Cut plain text at blank lines into documents this long; 0: don't.")
    ] = 0,
    skip_bad: Annotated[int, typer.Option(help="Malformed records to tolerate.")] = 0,
    workers: Annotated[int | None, typer.Option(help="Processes; default one per core.")] = None,
    as_json: Json = False,
) -> None:
    """Turn text into a tokenizer and two pools of tokens, training and validation.

    A start after an interruption finishes the job; a finished folder is left alone.
    """
    from data_pipeline.prepare.prepare import prepare as run
    from pretrain.cli.progress import make_progress
    from pretrain.config.prepare_file import default_out, read_settings, settings_of

    source = {
        "text_field": text_field,
        "id_field": id_field,
        "chunk_characters": chunk_characters,
    }
    values: dict[str, Any] = {
        "out": out or default_out(sources),
        "sources": [{"path": path, **source} for path in sources or ["builtin"]],
        "tokenizer": {"path": tokenizer, "model_type": model_type, "vocab_size": vocab_size},
        "validation_fraction": validation_fraction,
        "near_duplicates": near_duplicates,
        "seed": seed,
        "skip_bad": skip_bad,
        "workers": workers,
    }
    if settings is None:
        chosen = settings_of(values)
    else:
        chosen = read_settings(settings, out, workers, given(context))
    with make_progress(quiet=as_json) as progress:
        result = run(chosen, progress)
    if as_json:
        paths = {"train": str(result.train), "validation": str(result.validation)}
        shown = {**paths, "already_done": result.already_done, "report": result.report}
        print_json(shown)
        return
    _print_report(result.report)
    print(
        f"nothing to do: {chosen.out} is already prepared"
        if result.already_done
        else f"ready: data.train={result.train} data.validation={result.validation} "
        f"data.tokenizer={result.tokenizer}"
    )


def given(context: typer.Context) -> list[str]:
    """Names of the parameters that stand on the command line."""
    return [
        name
        for name in context.params
        if getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"
    ]


def _print_report(report: dict[str, Any]) -> None:
    for source in report["sources"]:
        dropped = ", ".join(f"{n:,} {why}" for why, n in source["dropped"].items() if n)
        print(
            f"{source['name']}: {source['documents_read']:,} documents, "
            f"{source['bytes_read'] / 1e6:.1f} MB read; dropped: {dropped or 'nothing'}"
        )
    for split, pool in report["pools"].items():
        print(
            f"{split}: {pool['tokens']:,} tokens from {pool['documents']:,} documents, "
            f"{pool['bytes_per_token']} bytes/token, {pool['shards']} shard(s), "
            f"{pool['round_trip']['failed']} of {pool['round_trip']['checked']} documents not "
            f"restored exactly, identity {pool['manifest_sha256'][:16]}"
        )
