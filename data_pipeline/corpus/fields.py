"""Fields of a record: the text, perhaps nested or joined from several, and the id.

`data.text` is the field `text` inside `data`; `title,text` joins two fields with a blank line
between them. A field whose name is the whole word, dots and commas included, comes first.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from data_pipeline.corpus.document import BadRecord, Document, document
from data_pipeline.corpus.source import SourceSettings

BETWEEN = "\n\n"
"""Text between joined fields."""


def text_fields(source: SourceSettings, names: Iterable[str] = ()) -> list[str]:
    """Fields that hold the text of a source; `names` are those that a record has."""
    if source.text_field in names:
        return [source.text_field]
    return [name.strip() for name in source.text_field.split(",")]


def first_name(field: str, names: Iterable[str]) -> str:
    """Name of the column that holds a field: its own, or the part before the first dot."""
    return field if field in names else field.partition(".")[0]


def record_document(
    record: dict[str, Any], source: SourceSettings, fallback: str, place: str
) -> Document | BadRecord:
    """Make a document of a record; a bad record where a text is missing or is none.

    `fallback` is the id where the record has none. An exception in place of a value says why the
    value could not be read.
    """
    parts = []
    for field in text_fields(source, record):
        text = _value(record, field)
        if isinstance(text, Exception):
            return BadRecord(place, f"field {field!r} cannot be read: {text}")
        if not isinstance(text, str):
            known = ", ".join(sorted(map(str, record))) or "none"
            return BadRecord(place, f"no text in field {field!r} (fields: {known})")
        parts.append(text)
    name = _value(record, source.id_field)
    name = None if isinstance(name, Exception | dict | list) else name
    joined = parts[0] if len(parts) == 1 else BETWEEN.join(part for part in parts if part)
    return document(name, joined, fallback, place, source.max_document_bytes)


def _value(record: dict[str, Any], field: str) -> Any:
    """Value of a field; None where there is none."""
    if field in record:
        return record[field]
    value: Any = record
    for part in field.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value
