"""Readers of plain text and of JSON lines, both also compressed."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_pipeline.corpus.compression import READ_ERRORS, open_decompressed
from data_pipeline.corpus.document import BadRecord, Document, Unit, document
from data_pipeline.corpus.source import SourceSettings
from data_pipeline.errors import CorpusError


def read_text(unit: Unit, source: SourceSettings) -> Iterator[Document | BadRecord]:
    """Read a plain text file as one document, or as one document a chunk of paragraphs."""
    try:
        with open_decompressed(Path(unit.path)) as file:
            text = file.read().decode("utf-8")
    except UnicodeDecodeError as error:
        yield BadRecord(unit.path, f"not UTF-8 at byte {error.start}")
        return
    except READ_ERRORS as error:
        raise CorpusError(f"cannot read {unit.path}: {error}") from error
    if not source.chunk_characters:
        yield Document(unit.label, text)
        return
    for number, chunk in enumerate(_paragraph_chunks(text, source.chunk_characters)):
        yield Document(f"{unit.label}#{number}", chunk)


def _paragraph_chunks(text: str, characters: int) -> Iterator[str]:
    """Chunks of at least `characters` that end after blank lines; together they are `text`."""
    start = 0
    for match in re.finditer(r"\n[ \t\r]*\n\s*", text):
        if match.end() - start >= characters and match.end() < len(text):
            yield text[start : match.end()]
            start = match.end()
    if start < len(text):
        yield text[start:]


def read_json_lines(unit: Unit, source: SourceSettings) -> Iterator[Document | BadRecord]:
    """Read a file of JSON objects, one document a line."""
    number = 0
    try:
        with open_decompressed(Path(unit.path)) as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield _parse_line(line, unit, number, source)
    except READ_ERRORS as error:
        raise CorpusError(f"cannot read {unit.path} after line {number}: {error}") from error


def _parse_line(
    line: bytes, unit: Unit, number: int, source: SourceSettings
) -> Document | BadRecord:
    place = f"{unit.path}:{number}"
    try:
        record: Any = json.loads(line)
    except ValueError as error:
        return BadRecord(place, f"not JSON ({error})")
    if not isinstance(record, dict):
        return BadRecord(place, "not a JSON object")
    text = record.get(source.text_field)
    if not isinstance(text, str):
        known = ", ".join(sorted(map(str, record))) or "none"
        return BadRecord(place, f"no text in field {source.text_field!r} (fields: {known})")
    return document(record.get(source.id_field), text, f"{unit.label}:{number}", place)
