"""Reader of tables with a header line: commas in `.csv`, tabs in `.tsv`."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path

from data_pipeline.corpus.compression import COMPRESSED, READ_ERRORS, open_decompressed
from data_pipeline.corpus.document import BadRecord, Document, Unit, too_large
from data_pipeline.corpus.fields import record_document, text_fields
from data_pipeline.corpus.source import SourceSettings
from data_pipeline.errors import CorpusError

_ERRORS: tuple[type[Exception], ...] = (*READ_ERRORS, csv.Error)


def read_csv(unit: Unit, source: SourceSettings) -> Iterator[Document | BadRecord]:
    """Read the rows of a table; a row of another length than its header is malformed."""
    path = Path(unit.path)
    inner = Path(path.stem) if path.suffix.lower() in COMPRESSED else path
    csv.field_size_limit(source.max_document_bytes)
    rows = None
    try:
        with open_decompressed(path) as file:
            text = io.TextIOWrapper(file, "utf-8-sig", errors="surrogateescape", newline="")
            rows = csv.reader(
                _lines(text, source.max_document_bytes),
                strict=True,
                delimiter="\t" if inner.suffix.lower() == ".tsv" else ",",
            )
            header = _header(next(rows, None), unit, source)
            while (row := _next(rows, unit)) is not None:
                if isinstance(row, BadRecord):
                    yield row
                elif row:
                    yield _document(row, header, rows.line_num, unit, source)
    except _TooLongError:
        line = rows.line_num + 1 if rows is not None else 1
        what = "a line, whose file is left there,"
        yield too_large(f"{unit.path}:{line}", what, source.max_document_bytes)
    except _ERRORS as error:
        line = rows.line_num if rows is not None else 0
        raise CorpusError(f"cannot read {unit.path} after line {line}: {error}") from error


class _TooLongError(Exception):
    """End of a file whose next line is too long."""


def _lines(file: io.TextIOWrapper, limit: int) -> Iterator[str]:
    """Lines of a file; _TooLongError at one of more than `limit` characters."""
    while line := file.readline(limit + 1):
        if len(line) > limit and not line.endswith("\n"):
            raise _TooLongError
        yield line


def _header(names: list[str] | None, unit: Unit, source: SourceSettings) -> list[str]:
    """Names of the columns; CorpusError where that of the text is missing or stands twice."""
    if not names:
        raise CorpusError(f"{unit.path} has no header line that names its columns")
    for field in text_fields(source, names):
        if field not in names:
            raise CorpusError(f"{unit.path} has no column {field!r}; columns: {', '.join(names)}")
    refuse_twice([*text_fields(source, names), source.id_field], names, unit)
    return names


def refuse_twice(wanted: list[str], names: list[str], unit: Unit) -> None:
    """Raise CorpusError where two columns have one of the `wanted` names."""
    for field in wanted:
        if names.count(field) > 1:
            places = " and ".join(str(i) for i, name in enumerate(names, 1) if name == field)
            raise CorpusError(
                f"{unit.path}: columns {places} are both called {field!r} (columns: "
                f"{', '.join(names)}); rename one of them"
            )


def _next(rows: Iterator[list[str]], unit: Unit) -> list[str] | BadRecord | None:
    """Next row; None at the end, a bad record for one that cannot be read."""
    try:
        return next(rows, None)
    except csv.Error as error:
        return BadRecord(f"{unit.path}:{getattr(rows, 'line_num', 0)}", f"not a row ({error})")


def _document(
    row: list[str], header: list[str], line: int, unit: Unit, source: SourceSettings
) -> Document | BadRecord:
    place = f"{unit.path}:{line}"
    if len(row) != len(header):
        return BadRecord(
            place, f"{len(row)} fields and the header has {len(header)}; quote texts with commas"
        )
    record = {name: _readable(value) for name, value in zip(header, row, strict=True)}
    return record_document(record, source, f"{unit.label}:{line}", place)


def _readable(value: str) -> str | Exception:
    """A value, or the error for one that is not UTF-8."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        return ValueError(f"not UTF-8 at character {error.start}")
    return value
