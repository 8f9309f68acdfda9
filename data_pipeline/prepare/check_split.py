"""The split, checked before any training: both pools must get a document."""

from __future__ import annotations

from math import ceil, log
from pathlib import Path

from data_pipeline.corpus.document import Unit
from data_pipeline.corpus.listing import BUILTIN, DATASET, format_of
from data_pipeline.errors import CorpusError
from data_pipeline.prepare.settings import PrepareSettings
from data_pipeline.prepare.tokenise import SPLITS, Buckets, Split


def check_split(settings: PrepareSettings, units: list[Unit], buckets: Buckets) -> None:
    """Raise CorpusError where a pool would be empty, with the change that gives it documents."""
    counts: dict[Split, int] = dict.fromkeys(SPLITS, 0)
    for bucket in range(buckets.count):
        for record, _ in buckets.unique(bucket):
            counts[buckets.split(record)] += 1
        if all(counts.values()):
            return
    documents, fraction = sum(counts.values()), settings.validation_fraction
    empty = next(split for split in SPLITS if not counts[split])
    needed = ceil(log(100) / -log(1 - (fraction if empty == "validation" else 1 - fraction)))
    advice = [*_splits(settings, units), "give more documents"]
    if documents > 1:
        change = "raise" if empty == "validation" else "lower"
        advice.append(f"{change} validation_fraction")
    raise CorpusError(
        f"the {empty} pool would be empty: the sources hold {documents:,} different document(s), "
        f"and with validation_fraction {fraction:g} some {needed:,} are needed; "
        + ", or ".join(advice)
    )


def _splits(settings: PrepareSettings, units: list[Unit]) -> list[str]:
    """Finer splits of the plain text among the units, as advice."""
    kinds = {
        settings.sources[unit.source].documents
        for unit in units
        if unit.path != BUILTIN
        and not unit.path.startswith(DATASET)
        and format_of(Path(unit.path), settings.sources[unit.source]) == "txt"
    }
    if "files" in kinds:
        return ["make a document of each paragraph (--split paragraphs) or line (--split lines)"]
    finer = ["make a document of each line (--split lines)"] if "paragraphs" in kinds else []
    smaller = any(source.chunk_characters for source in settings.sources)
    return [*finer, *(["lower chunk_characters"] if smaller else [])]
