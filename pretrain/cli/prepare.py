"""`epochal data prepare`: its options, and its report at the end."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pretrain.cli.output import Json, print_json

if TYPE_CHECKING:
    from data_pipeline.prepare.settings import PrepareSettings

# The task: where text comes from and where the result goes.
Sources = Annotated[
    list[str] | None,
    typer.Argument(
        help="Text, JSON, CSV or Parquet files, folders of them, `hf:NAME`, or `builtin` (the "
        "text of the Python installation, the default)."
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(
        help="Folder for tokenizer and pools; default: data/pool, data/builtin for `builtin`."
    ),
]
SettingsFile = Annotated[
    Path | None, typer.Option(help="YAML file with all settings, instead of the options.")
]
Workers = Annotated[int | None, typer.Option(help="Processes; default one per core.")]

# The tokenizer.
VocabSize = Annotated[
    int | None,
    typer.Option(help="Ids of the tokenizer to train; default: by the size of the text."),
]
CharacterCoverage = Annotated[
    float, typer.Option(help="Share of characters that become ids; rarer ones are bytes.")
]
Model = Annotated[str, typer.Option(help="`unigram` or `bpe`.")]
TokenizerFile = Annotated[
    Path | None, typer.Option(help="Existing tokenizer file, instead of training one.")
]

# The pools.
ValidationFraction = Annotated[float, typer.Option(help="Share of documents kept for validation.")]
NearDuplicates = Annotated[
    float | None,
    typer.Option(help="Drop documents this similar (Jaccard, e.g. 0.8); default: keep them."),
]
Seed = Annotated[int, typer.Option(help="Key of the document order.")]

# Every source.
TextField = Annotated[
    str, typer.Option(help="Field that holds the text: `text`, nested `data.text`, `title,text`.")
]
IdField = Annotated[str, typer.Option(help="Field that holds a document's id.")]
Split = Annotated[
    str | None,
    typer.Option(help="Plain text: `files`, `paragraphs` or `lines` are documents; default files."),
]
ChunkCharacters = Annotated[
    int, typer.Option(help="Join paragraphs (or lines) to documents this long; 0: don't.")
]
MaxDocumentBytes = Annotated[
    int, typer.Option(help="Largest document or line; a larger one is malformed.")
]
SkipBad = Annotated[int, typer.Option(help="Malformed records to tolerate.")]


def prepare(
    context: typer.Context,
    sources: Sources = None,
    out: Out = None,
    settings: SettingsFile = None,
    vocab_size: VocabSize = None,
    model_type: Model = "unigram",
    character_coverage: CharacterCoverage = 0.9995,
    tokenizer: TokenizerFile = None,
    validation_fraction: ValidationFraction = 0.01,
    near_duplicates: NearDuplicates = None,
    seed: Seed = 17,
    text_field: TextField = "text",
    id_field: IdField = "id",
    split: Split = None,
    chunk_characters: ChunkCharacters = 0,
    max_document_bytes: MaxDocumentBytes = 64 << 20,
    skip_bad: SkipBad = 0,
    workers: Workers = None,
    as_json: Json = False,
) -> None:
    """Turn text into a tokenizer and two pools of tokens, training and validation.

    A start after an interruption finishes the job; a finished folder is left alone.
    """
    from pretrain.config.prepare_file import default_out, read_settings, settings_of

    if settings is not None:
        _prepare(read_settings(settings, out, workers, given(context)), as_json)
        return
    fields = {
        "text_field": text_field,
        "id_field": id_field,
        "split": split,
        "chunk_characters": chunk_characters,
        "max_document_bytes": max_document_bytes,
    }
    values: dict[str, Any] = {
        "out": out or default_out(sources),
        "sources": [{"path": path, **fields} for path in sources or ["builtin"]],
        "tokenizer": {
            "path": tokenizer,
            "model_type": model_type,
            "vocab_size": vocab_size,
            "character_coverage": character_coverage,
        },
        "validation_fraction": validation_fraction,
        "near_duplicates": near_duplicates,
        "seed": seed,
        "skip_bad": skip_bad,
        "workers": workers,
    }
    _prepare(settings_of(values), as_json)


def given(context: typer.Context) -> list[str]:
    """Names of the parameters that stand on the command line."""
    return [
        name
        for name in context.params
        if getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"
    ]


def _prepare(settings: PrepareSettings, as_json: bool) -> None:
    """Run a preparation and print its report."""
    from data_pipeline.prepare.prepare import prepare as run
    from pretrain.cli.progress import make_progress

    with make_progress(quiet=as_json) as progress:
        result = run(settings, progress)
    if as_json:
        paths = {"train": str(result.train), "validation": str(result.validation)}
        print_json({**paths, "already_done": result.already_done, "report": result.report})
        return
    _print_report(result.report)
    print(
        f"nothing to do: {settings.out} is already prepared"
        if result.already_done
        else f"ready: data.train={result.train} data.validation={result.validation} "
        f"data.tokenizer={result.tokenizer}"
    )


def _print_report(report: dict[str, Any]) -> None:
    """Print one line for each source and each pool."""
    for source in report["sources"]:
        dropped = ", ".join(f"{n:,} {why}" for why, n in source["dropped"].items() if n)
        print(
            f"{source['name']}: {source['documents_read']:,} documents, "
            f"{source['bytes_read'] / 1e6:.1f} MB read; dropped: {dropped or 'nothing'}"
        )
        if ignored := source.get("ignored_files"):
            counts = ", ".join(f"{n:,} {ending}" for ending, n in ignored.items())
            print(f"{source['name']}: files ignored: {counts}")
    if similar := report.get("near_duplicates"):
        print(
            f"near-duplicates dropped: {similar['copies']:,} like an earlier document, "
            f"{similar['train_like_validation']:,} training documents like a validation document"
        )
    if chosen := report.get("vocabulary"):
        from data_pipeline.prepare.vocabulary import Vocabulary

        print(f"{Vocabulary(**chosen).words}; trained: {report['tokenizer']['vocab_size']:,} ids")
    for split, pool in report["pools"].items():
        print(
            f"{split}: {pool['tokens']:,} tokens from {pool['documents']:,} documents, "
            f"{pool['bytes_per_token']} bytes/token, {pool['shards']} shard(s), "
            f"{pool['round_trip']['failed']} of {pool['round_trip']['checked']} documents not "
            f"restored exactly, identity {pool['manifest_sha256'][:16]}"
        )
