"""The whole preparation: collect, train a tokenizer, tokenise, pack; restartable at any moment.

Every stage publishes its results atomically under `OUT/.staging`, so a start after a kill redoes
only what was unfinished and ends with the same bytes. `report.json` is written last: a folder that
has one is finished.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from data_pipeline.corpus.compression import COMPRESSED
from data_pipeline.corpus.document import Unit
from data_pipeline.corpus.listing import Listing, list_sources
from data_pipeline.errors import CorpusError, DataError
from data_pipeline.prepare.check_split import check_split
from data_pipeline.prepare.collect import CollectJob, collect_unit
from data_pipeline.prepare.identity import (
    discard_other_start,
    inputs_sha256,
    read_record,
    refuse_other_preparation,
    settings_sha256,
)
from data_pipeline.prepare.make_tokenizer import make_tokenizer
from data_pipeline.prepare.near_duplicates import find_near_duplicates
from data_pipeline.prepare.pack import manifest_summary, pack_split, validation_below
from data_pipeline.prepare.settings import PrepareSettings
from data_pipeline.prepare.tokenise import SPLITS, Buckets, TokeniseJob, tokenise_bucket
from data_pipeline.prepare.workers import map_jobs
from data_pipeline.progress import Progress, Silent
from data_pipeline.shards.files import inside, write_atomically
from data_pipeline.tokenizer import load_tokenizer

_BUCKET_BYTES = 4_000_000
_MAX_BUCKETS = 4096
_COMPRESSION = 4
_UNKNOWN_BYTES = 8_000_000


@dataclass(frozen=True)
class PreparedData:
    """Result of a preparation: its files and its report."""

    train: Path
    """Manifest of the training pool."""
    validation: Path
    """Manifest of the validation pool."""
    tokenizer: Path
    report: dict[str, Any]
    """Content of `report.json`: counts per source, what was dropped and why."""
    already_done: bool
    """True if the folder was finished before this call."""


def prepare(settings: PrepareSettings, progress: Progress | None = None) -> PreparedData:
    """Prepare `settings.out`, or finish the preparation that an interrupted start began there.

    Raises CorpusError, TokenizerError or DataError; finished parts are kept for the next start.
    """
    progress = progress or Silent()
    units, ignored = list_sources(settings.sources)
    identity = {
        "settings_sha256": settings_sha256(settings),
        "inputs_sha256": inputs_sha256(units, settings),
    }
    refuse_other_preparation(settings.out / "report.json", identity, settings)
    staging = settings.out / ".staging"
    already_done = (settings.out / "report.json").exists()
    if not already_done:
        try:
            with _locked(settings.out):
                _run_stages(settings, Listing(units, ignored), identity, staging, progress)
        except OSError as error:
            raise DataError(
                f"cannot write below {settings.out}: {error.strerror or error}; make room (or fix "
                "the folder) and start again: what is finished is kept"
            ) from error
    shutil.rmtree(staging, ignore_errors=True)
    (settings.out / ".lock").unlink(missing_ok=True)
    report = read_record(settings.out / "report.json")
    return PreparedData(
        train=settings.out / "train" / "manifest.json",
        validation=settings.out / "validation" / "manifest.json",
        tokenizer=_tokenizer_of(settings.out, report),
        report=report,
        already_done=already_done,
    )


def _tokenizer_of(out: Path, report: dict[str, Any]) -> Path:
    """Path of the tokenizer that a report names; DataError where it names none in the folder."""
    match report.get("tokenizer"):
        case {"file": str(name)}:
            return inside(out, name)
    raise DataError(f"{out}/report.json names no tokenizer; prepare the data again")


def _run_stages(
    settings: PrepareSettings,
    listing: Listing,
    identity: dict[str, str],
    staging: Path,
    progress: Progress,
) -> None:
    """Run the stages that are left and write the report."""
    units = listing.units
    discard_other_start(settings.out, identity, progress)
    for name in ("collected", "tokens"):
        (staging / name).mkdir(parents=True, exist_ok=True)
    if not (staging / "identity.json").exists():
        write_atomically(staging / "identity.json", json.dumps(identity))
    for folder in (settings.out, *(settings.out / s for s in SPLITS)):
        for leftover in folder.glob("*.tmp*"):
            leftover.unlink()
    buckets, collected = _collect(settings, units, staging / "collected", progress)
    buckets, similar = _without_near_duplicates(settings, buckets, staging, progress)
    check_split(settings, units, buckets)
    tokenizer_path, vocabulary = make_tokenizer(settings, buckets, staging, progress)
    results = _tokenise(settings, buckets, tokenizer_path, staging / "tokens", progress)
    tokenizer = load_tokenizer(tokenizer_path)
    summaries: dict[str, Any] = {}
    for split in SPLITS:
        path = pack_split(split, settings, tokenizer, results, staging / "tokens", progress)
        summaries[split] = manifest_summary(path)
    report: dict[str, Any] = {
        **identity,
        "settings": settings.content(),
        "vocabulary": vocabulary,
        "tokenizer": {"file": tokenizer_path.name, **tokenizer.record.model_dump(mode="json")},
        "pools": summaries,
        "sources": _source_report(settings, listing.ignored, collected, results),
        "near_duplicates": similar,
    }
    write_atomically(settings.out / "report.json", json.dumps(report, indent=1))


def _collect(
    settings: PrepareSettings, units: list[Unit], folder: Path, progress: Progress
) -> tuple[Buckets, list[dict[str, Any]]]:
    """Read all units into runs; the buckets of these, and the counts of every unit."""
    factors = (_COMPRESSION if u.path.lower().endswith(COMPRESSED) else 1 for u in units)
    size = sum(
        (u.bytes or _UNKNOWN_BYTES) * factor for u, factor in zip(units, factors, strict=True)
    )
    count = max(1, min(_MAX_BUCKETS, size // _BUCKET_BYTES))
    jobs = [
        CollectJob(
            unit,
            number,
            settings.sources[unit.source],
            settings.seed,
            count,
            str(folder),
            settings.skip_bad,
        )
        for number, unit in enumerate(units)
    ]
    progress.start("reading documents", len(jobs), "files")
    collected: list[dict[str, Any]] = [{} for _ in jobs]
    bad = 0
    for index, result in map_jobs(collect_unit, jobs, _workers(settings)):
        collected[index] = result
        bad += result["bad"]
        progress.advance(1, bytes=result["bytes"], documents=result["documents"])
        if bad > settings.skip_bad:
            break
    if bad > settings.skip_bad:
        examples = [line for result in collected for line in result.get("examples", [])]
        raise CorpusError(
            f"malformed records: found {bad}, {settings.skip_bad} are allowed (--skip-bad):\n  "
            + "\n  ".join(examples[:5])
        )
    if not any(result["documents"] for result in collected):
        raise CorpusError(
            "the sources hold no text: " + ", ".join(s.path for s in settings.sources)
        )
    runs = tuple((n, run) for n, result in enumerate(collected) for run in result["runs"])
    below = validation_below(settings)
    sources = tuple(unit.source for unit in units)
    return Buckets(str(folder), runs, sources, count, below), collected


def _without_near_duplicates(
    settings: PrepareSettings, buckets: Buckets, staging: Path, progress: Progress
) -> tuple[Buckets, dict[str, Any] | None]:
    """Buckets without the documents that resemble others, and their entry in the report."""
    if settings.near_duplicates is None:
        return buckets, None
    path = staging / "near_duplicates.json"
    if not path.exists():
        found = find_near_duplicates(buckets, settings.near_duplicates, progress)
        write_atomically(path, json.dumps(asdict(found)))
    saved = json.loads(path.read_text())
    dropped = frozenset([*saved["contaminated"], *saved["copies"]])
    return replace(buckets, dropped=dropped), {
        "threshold": settings.near_duplicates,
        "train_like_validation": len(saved["contaminated"]),
        "copies": len(saved["copies"]),
        "examples": saved["examples"],
    }


def _tokenise(
    settings: PrepareSettings, buckets: Buckets, tokenizer: Path, folder: Path, progress: Progress
) -> list[dict[str, Any]]:
    """Tokenise all buckets; the counts of each."""
    jobs = [TokeniseJob(buckets, b, str(tokenizer), str(folder)) for b in range(buckets.count)]
    progress.start("tokenising", len(jobs), "buckets")
    results: list[dict[str, Any]] = [{} for _ in jobs]
    for index, result in map_jobs(tokenise_bucket, jobs, _workers(settings)):
        results[index] = result
        done = [counts for split in SPLITS for counts in result[split]["sources"].values()]
        progress.advance(
            1,
            bytes=sum(counts["raw_bytes"] for counts in done),
            tokens=sum(counts["tokens"] for counts in done),
        )
    return results


def _source_report(
    settings: PrepareSettings,
    ignored: list[dict[str, int]],
    collected: list[dict[str, Any]],
    results: list[dict[str, Any]],
) -> list[dict[str, Any]]:
    """Counts of every source: documents read, documents dropped and why."""
    report = []
    for index, source in enumerate(settings.sources):
        units = [result for result in collected if result["source"] == index]
        report.append(
            {
                "name": source.label,
                "files": len(units),
                "documents_read": sum(u["documents"] for u in units),
                "bytes_read": sum(u["bytes"] for u in units),
                "dropped": {
                    "exact_duplicates": sum(r["duplicates"].get(str(index), 0) for r in results),
                    "empty": sum(u["empty"] for u in units),
                    "malformed": sum(u["bad"] for u in units),
                },
                "ignored_files": ignored[index],
                "malformed_examples": [line for u in units for line in u["examples"]][:5],
            }
        )
    return report


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Hold the lock of a folder, in which one preparation may work; it ends with its process."""
    out.mkdir(parents=True, exist_ok=True)
    lock = FileLock(out / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise DataError(f"another preparation is working in {out}; wait for it to end") from None
    try:
        yield
    finally:
        lock.release()


def _workers(settings: PrepareSettings) -> int:
    return settings.workers or len(os.sched_getaffinity(0))
