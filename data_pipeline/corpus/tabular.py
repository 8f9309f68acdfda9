"""Readers that need the `data` extra: Parquet files and Hugging Face datasets, streamed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_pipeline.corpus.document import BadRecord, Document, Unit, document
from data_pipeline.corpus.source import SourceSettings
from data_pipeline.errors import CorpusError
from data_pipeline.regular import open_regular

_ROWS = 1024


def read_parquet(unit: Unit, source: SourceSettings) -> Iterator[Document | BadRecord]:
    """Read the documents of one Parquet file, a thousand rows at a time."""
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError:
        raise CorpusError(
            f"reading {unit.path} needs pyarrow: pip install 'epochal[data]'"
        ) from None
    try:
        with open_regular(Path(unit.path)) as opened, parquet.ParquetFile(opened) as file:
            names = file.schema_arrow.names
            if source.text_field not in names:
                raise CorpusError(
                    f"{unit.path} has no column {source.text_field!r}; columns: {', '.join(names)}"
                )
            columns = [c for c in (source.text_field, source.id_field) if c in names]
            rows = (
                row
                for batch in file.iter_batches(_ROWS, columns=columns)
                for row in batch.to_pylist()
            )
            yield from _documents(rows, unit, source, f"{unit.path} row ")
    except (pyarrow.ArrowException, OSError) as error:
        raise CorpusError(f"cannot read {unit.path}: {error}") from error


def read_dataset(unit: Unit, source: SourceSettings) -> Iterator[Document | BadRecord]:
    """Read the rows of `hf:NAME` or `hf:NAME#CONFIG:SPLIT` (default split: train), streamed."""
    try:
        import datasets
    except ImportError:
        raise CorpusError(
            f"reading {unit.path} needs datasets: pip install 'epochal[data]'"
        ) from None
    name, _, split = unit.path.removeprefix("hf:").partition(":")
    name, _, config = name.partition("#")
    try:
        rows = datasets.load_dataset(name, config or None, split=split or "train", streaming=True)
        yield from _documents(rows, unit, source, f"{unit.path} row ")
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise CorpusError(f"cannot read the dataset {unit.path}: {error}") from error


def _documents(
    rows: Any, unit: Unit, source: SourceSettings, place: str
) -> Iterator[Document | BadRecord]:
    """Documents of `rows`; a bad record for a row without text."""
    for number, row in enumerate(rows, 1):
        text = row.get(source.text_field)
        if isinstance(text, str):
            fallback = f"{unit.label}:{number}"
            limit = source.max_document_bytes
            yield document(row.get(source.id_field), text, fallback, f"{place}{number}", limit)
        else:
            yield BadRecord(f"{place}{number}", f"no text in column {source.text_field!r}")
