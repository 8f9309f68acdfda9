"""Reader of JSON files: one object, an array of objects, or lines under the ending of a file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_pipeline.corpus.compression import READ_ERRORS, open_decompressed
from data_pipeline.corpus.document import BadRecord, Document, Unit
from data_pipeline.corpus.fields import record_document
from data_pipeline.corpus.source import SourceSettings
from data_pipeline.corpus.text import mostly_brackets, read_json_lines
from data_pipeline.errors import CorpusError
from data_pipeline.json_keys import refuse_repeats

LARGEST = 64 << 20
"""Bytes of the largest file that is parsed as a whole; lines may be longer in sum."""


def read_json(unit: Unit, source: SourceSettings) -> Iterator[Document | BadRecord]:
    """Read an object, or every object of an array; a file of lines is read as JSON lines."""
    try:
        with open_decompressed(Path(unit.path)) as file:
            content = file.read(LARGEST + 1)
    except READ_ERRORS as error:
        raise CorpusError(f"cannot read {unit.path}: {error}") from error
    if _is_lines(content):
        yield from read_json_lines(unit, source)
        return
    if len(content) > LARGEST:
        yield BadRecord(
            unit.path, f"one JSON value of more than {LARGEST:,} bytes; write one object a line"
        )
        return
    if mostly_brackets(content):
        yield BadRecord(unit.path, "mostly brackets, which would fill the memory")
        return
    try:
        value: Any = json.loads(content, object_pairs_hook=_object)
    except RecursionError:
        yield BadRecord(unit.path, "JSON that is nested too deeply")
        return
    except ValueError as error:
        yield BadRecord(unit.path, f"not JSON ({error})")
        return
    for number, record in enumerate(value if isinstance(value, list) else [value], 1):
        listed = isinstance(value, list)
        place = f"{unit.path} item {number}" if listed else unit.path
        if isinstance(record, dict):
            fallback = f"{unit.label}:{number}" if listed else unit.label
            yield record_document(record, source, fallback, place)
        else:
            yield BadRecord(place, "not a JSON object")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    refuse_repeats(pairs)
    return dict(pairs)


def _is_lines(content: bytes) -> bool:
    """True where the first line is a whole object and another line follows."""
    first, _, rest = content.lstrip(b"\xef\xbb\xbf \t\r\n").partition(b"\n")
    if not first.startswith(b"{") or not rest.strip():
        return False
    try:
        json.loads(first)
    except (ValueError, RecursionError):
        return False
    return True
