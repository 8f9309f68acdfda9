"""Readers that need the `data` extra: Parquet files and Hugging Face datasets, streamed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_pipeline.corpus.csv_file import refuse_twice
from data_pipeline.corpus.document import BadRecord, Document, Unit
from data_pipeline.corpus.fields import first_name, record_document, text_fields
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
            columns = _columns(file.schema_arrow.names, unit, source)
            batches = file.iter_batches(_ROWS, columns=columns)
            rows = (row for batch in batches for row in _rows(batch))
            yield from _documents(rows, unit, source, f"{unit.path} row ")
    except (pyarrow.ArrowException, OSError) as error:
        raise CorpusError(f"cannot read {unit.path}: {error}") from error


def _columns(names: list[str], unit: Unit, source: SourceSettings) -> list[str]:
    """Columns to read; CorpusError where one of the text is missing or stands twice."""
    texts = text_fields(source, names)
    for field in texts:
        if first_name(field, names) not in names:
            raise CorpusError(f"{unit.path} has no column {field!r}; columns: {', '.join(names)}")
    present = [f for f in (*texts, source.id_field) if first_name(f, names) in names]
    refuse_twice([first_name(field, names) for field in present], names, unit)
    return present


def _rows(batch: Any) -> Iterator[dict[str, Any]]:
    """Rows of a batch; where one cannot be converted, its value is the exception."""
    try:
        rows = batch.to_pylist()
    except (ValueError, OverflowError):  # e.g. a column of strings that are no UTF-8
        rows = []
    yield from rows
    for number in range(len(rows), batch.num_rows):
        row: dict[str, Any] = {}
        for name in batch.schema.names:
            try:
                row[name] = batch.column(name)[number].as_py()
            except (ValueError, OverflowError) as error:
                row[name] = error
        yield row


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
    """Documents of `rows`; bad records for those without text."""
    for number, row in enumerate(rows, 1):
        yield record_document(row, source, f"{unit.label}:{number}", f"{place}{number}")
