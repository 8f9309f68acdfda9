"""`epochal data`: `prepare` (in `pretrain.cli.prepare`), `verify`, `inspect` and `stats`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from pretrain.cli.output import Json, print_json, visible
from pretrain.cli.prepare import given, prepare

if TYPE_CHECKING:
    from data_pipeline.shards.pool import TokenPool
    from data_pipeline.stream.inspection import StepPositions
    from data_pipeline.stream.stream import Stream
    from pretrain.config.run import Config

app = typer.Typer(
    name="data",
    help="Prepare text for training, verify pools, look into them.",
    no_args_is_help=True,
)

app.command()(prepare)


@app.command()
def verify(
    paths: Annotated[
        list[Path] | None, typer.Argument(help="Manifests or prepared folders.")
    ] = None,
    visits: Annotated[
        Path | None,
        typer.Option(metavar="RUN", help="Count what this run saw, from its log."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Compare bytes with manifests, or a run's visits with its budget; list all problems."""
    from data_pipeline.errors import DataError, ShardError
    from data_pipeline.shards.verify import find_manifests, pool_problems
    from pretrain.cli.progress import make_progress

    if visits is not None and paths:
        raise DataError(
            f"--visits {visits} counts a run's visits and {paths[0]} names bytes to verify; "
            "give one of them"
        )
    if visits is not None:
        _verify_visits(visits, as_json)
        return
    if not paths:
        raise DataError("nothing to verify: give manifests or prepared folders, or --visits RUN")
    manifests = [found for path in paths for found in find_manifests(path)]
    with make_progress(quiet=as_json) as progress:
        problems = {str(path): pool_problems(path, progress) for path in manifests}
    found = [line for lines in problems.values() for line in lines]
    if as_json:
        print_json({"ok": not found, "problems": problems})
        if found:
            raise typer.Exit(ShardError.exit_code)
    elif found:
        listed = "\n  ".join(found)
        raise ShardError(
            f"{len(found)} problem(s):\n  {listed}\nrestore these files or prepare the data again"
        )
    else:
        print(f"all bytes agree with {len(manifests)} manifest(s)")


@app.command()
def inspect(
    context: typer.Context,
    source: Annotated[Path, typer.Argument(help="Manifest of a pool, or folder of a run.")],
    sequence: Annotated[
        list[int] | None, typer.Option(help="Sequence of the pool to show; may be repeated.")
    ] = None,
    position: Annotated[
        list[int] | None, typer.Option(help="Global position of the run; may be repeated.")
    ] = None,
    step: Annotated[
        int | None, typer.Option(help="Step of the run: all its positions, from the run's log.")
    ] = None,
    seq_length: Annotated[int, typer.Option(help="Tokens per sequence of a pool.")] = 1024,
    tokenizer: Annotated[
        Path | None, typer.Option(help="Tokenizer; default: the one beside the pools.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show decoded sequences of a pool, or what a run sees at a position or a step."""
    _check_place(source, given(context))
    if source.is_dir():
        view = _view_of_run(source, tokenizer, position or [], step)
    else:
        view = _view_of_pool(source, tokenizer, sequence or [0], seq_length)
    if as_json:
        print_json(_plain(view))
    else:
        _print_view(view)


@app.command()
def stats(
    manifest: Annotated[Path, typer.Argument(help="Manifest of a pool.")],
    as_json: Json = False,
) -> None:
    """Count documents and tokens of a pool: lengths, vocabulary in use, unigram entropy."""
    from data_pipeline.shards.pool import TokenPool
    from data_pipeline.stream.inspection import pool_statistics

    found = pool_statistics(TokenPool(manifest, verify="size"))
    if as_json:
        print_json(found)
        return
    for key, value in found.items():
        if isinstance(value, dict):
            shown = ", ".join(f"{name} {number:,.0f}" for name, number in value.items())
        elif isinstance(value, list):
            shown = " ".join(map(str, value))
        else:
            shown = f"{value:,.4g}" if isinstance(value, float) else f"{value:,}"
        print(f"{key.replace('_', ' '):22} {shown}")


class _View(NamedTuple):
    """Answer of `inspect`: pools, the sequences to show, and the step that they belong to."""

    pools: list[TokenPool]
    shown: list[dict[str, Any]]
    step: StepPositions | None = None


def _view_of_run(
    run: Path, tokenizer: Path | None, positions: list[int], step: int | None
) -> _View:
    """Sequences of a run at global positions and in a step; position 0 where none is named."""
    from data_pipeline.stream.inspection import check_tokenizer, describe_position
    from data_pipeline.tokenizer import load_tokenizer

    config, stream = _run_stream(run)
    pools = [part.pool for _, part in stream.parts]
    model = load_tokenizer(tokenizer or config.data.tokenizer)
    taken = None if step is None else _step_positions(run, step, config, stream)
    wanted = [*positions, *(range(taken.start, taken.stop) if taken else ())]
    check_tokenizer(pools[0].manifest, model)
    shown = [describe_position(stream, model, position) for position in wanted or [0]]
    return _View(pools, shown, taken)


def _view_of_pool(
    manifest: Path, tokenizer: Path | None, sequences: list[int], seq_length: int
) -> _View:
    """Sequences of a pool by number."""
    from data_pipeline.shards.pool import TokenPool
    from data_pipeline.stream.inspection import check_tokenizer, describe_sequence
    from data_pipeline.tokenizer import load_tokenizer

    pool = TokenPool(manifest, verify="lazy")
    model = load_tokenizer(tokenizer or manifest.parent.parent / "tokenizer.model")
    check_tokenizer(pool.manifest, model)
    shown = [describe_sequence(pool, model, number, seq_length) for number in sequences]
    return _View([pool], shown)


def _plain(view: _View) -> dict[str, Any]:
    """A view as one JSON object: the manifest of its pool (or `pools`), `step` and `shown`."""
    from dataclasses import asdict

    about = [
        {"manifest_sha256": m.sha256, **m.model_dump(mode="json", exclude={"shards"})}
        for m in (pool.manifest for pool in view.pools)
    ]
    head = about[0] if len(about) == 1 else {"pools": about}
    step = {} if view.step is None else {"step": asdict(view.step)}
    return {**head, **step, "shown": view.shown}


def _print_view(view: _View) -> None:
    """Print a view for people: pools, step, then the text of every sequence."""
    for pool in view.pools:
        print(
            f"{pool.manifest.split} pool {pool.manifest.sha256[:16]}: {pool.num_tokens:,} tokens, "
            f"{pool.manifest.documents.count:,} documents, {len(pool.manifest.shards)} shard(s), "
            f"{pool.manifest.bytes_per_token:.3f} bytes/token"
        )
    if view.step is not None:
        taken = view.step
        print(f"step {taken.step:,}: positions {taken.start:,} to {taken.stop:,}; {taken.basis}")
    for entry in view.shown:
        first, last = entry["pool_tokens"]
        run = "position" in entry
        at = f"position {entry['position']:,}, epoch {entry['epoch']}, " if run else ""
        at += f"source {entry['source']}, " if "source" in entry else ""
        print(
            f"\n--- {at}sequence {entry['sequence']:,} (tokens {first:,} to {last:,}), "
            f"documents begin at {entry['document_starts']}\n{visible(entry['text'])}"
        )


def _check_place(source: Path, given: list[str]) -> None:
    """Raise DataError for options of `inspect` that belong to the other kind of place."""
    from data_pipeline.errors import DataError

    run = source.is_dir()
    if run and not (source / "config.yaml").exists():
        raise DataError(
            f"{source} is not a run folder: it has no config.yaml. To look into a pool name its "
            f"manifest, e.g. {source / 'train' / 'manifest.json'}"
        )
    foreign = ("sequence", "seq_length") if run else ("position", "step")
    for name in foreign:
        if name in given:
            kinds = ("a pool's manifest", "a run") if run else ("a run folder", "a manifest")
            raise DataError(
                f"--{name.replace('_', '-')} belongs to {kinds[0]} and {source} is {kinds[1]}; "
                f"use {'--position or --step' if run else '--sequence'}"
            )


def _run_stream(run: Path) -> tuple[Config, Stream]:
    """Configuration and training stream of a run folder."""
    from pretrain.config.compose import load_config
    from pretrain.data import training_stream

    config = load_config(run / "config.yaml")
    return config, training_stream(config)


def _step_positions(run: Path, step: int, config: Config, stream: Stream) -> StepPositions:
    """Positions of a step, from the log of the run."""
    from data_pipeline.stream.inspection import step_positions
    from pretrain.tracking.jsonl import read_metrics

    log = run / "metrics.jsonl"
    rows = read_metrics(log) if log.exists() else []
    return step_positions(rows, step, config.train.global_batch_size, stream.total_positions)


def _verify_visits(run: Path, as_json: bool) -> None:
    """Count the visits of a run and print them; DataError if its log does not prove them."""
    from dataclasses import asdict

    from data_pipeline.errors import DataError
    from data_pipeline.stream.visits import visit_report
    from pretrain.tracking.jsonl import read_metrics

    _, stream = _run_stream(run)
    log = run / "metrics.jsonl"
    if not log.exists():
        raise DataError(f"no {log}: has this run begun?")
    report = visit_report(stream, read_metrics(log))
    if as_json:
        print_json({"ok": not report.problems, **asdict(report)})
        if report.problems:
            raise typer.Exit(DataError.exit_code)
        return
    print(
        f"{report.positions:,} sequences, {report.epochs:.4g} epochs of {stream.unique_tokens:,} "
        f"tokens, {report.tokens_scored:,} scored"
    )
    for seen, (_, part) in zip(report.sources, stream.parts, strict=True):
        print(
            f"{seen.name or 'pool'}: {seen.unique_tokens:,} unique tokens of a budget of "
            f"{part.unique_tokens:,}; each sequence visited {seen.min_visits} to "
            f"{seen.max_visits} times"
        )
    if report.problems:
        listed = "\n  ".join(report.problems)
        raise DataError(f"the log of {run} does not prove its visits:\n  {listed}")
