"""Readers of plain text and of JSON lines, both also compressed."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_pipeline.corpus.compression import READ_ERRORS, Reader, open_decompressed
from data_pipeline.corpus.document import BadRecord, Document, Unit, too_large
from data_pipeline.corpus.fields import record_document, text_fields
from data_pipeline.corpus.source import SourceSettings
from data_pipeline.errors import CorpusError
from data_pipeline.json_keys import refuse_repeats

_ENDS = {
    "paragraphs": re.compile(r"\n[ \t\r]*\n\s*"),
    "lines": re.compile(r"\n(?:[ \t\r]*\n)*"),
}
"""Ends of documents, by the setting `split`; blank lines belong to the text before them."""
_BYTE_ORDER_MARK = "\ufeff"
_BLOCK = 1 << 20
_LONG = 8 << 20
"""Bytes of a line from which on its structure is looked at before it is parsed."""


def read_text(unit: Unit, source: SourceSettings) -> Iterator[Document | BadRecord]:
    """Read a plain text file as one document, or as chunks of paragraphs or lines."""
    limit = source.max_document_bytes
    try:
        with open_decompressed(Path(unit.path)) as file:
            if source.documents != "files":
                yield from _read_chunks(file, unit, source)
                return
            content = file.read(limit + 1)
    except READ_ERRORS as error:
        raise CorpusError(f"cannot read {unit.path}: {error}") from error
    if len(content) > limit:
        yield too_large(unit.path, "a document", limit)
        return
    try:
        yield Document(unit.label, content.decode("utf-8").removeprefix(_BYTE_ORDER_MARK))
    except UnicodeDecodeError as error:
        yield BadRecord(unit.path, f"not UTF-8 at byte {error.start}")


def _read_chunks(
    file: Reader, unit: Unit, source: SourceSettings
) -> Iterator[Document | BadRecord]:
    """Chunks that stop at the ends of paragraphs or lines; together they are the text.

    Only the chunk at hand is in memory. A file is left where it is not UTF-8 or a chunk is too
    large.
    """
    ends, characters = _ENDS[source.documents], source.chunk_characters
    decoder = codecs.getincrementaldecoder("utf-8")()
    number, text, place = 0, "", 0
    while True:
        block = file.read(_BLOCK)
        try:
            text += decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            start = place - len(decoder.getstate()[0]) + error.start
            yield BadRecord(unit.path, f"not UTF-8 at byte {start}; its rest is left out")
            return
        if place == 0:
            text = text.removeprefix(_BYTE_ORDER_MARK)
        place += len(block)
        start, last = 0, len(text.rstrip())
        for match in ends.finditer(text):
            # What the next block begins with could still belong to the blank lines at the end.
            if match.end() - start >= characters and match.end() < last:
                yield Document(f"{unit.label}#{number}", text[start : match.end()])
                number, start = number + 1, match.end()
        text = text[start:]
        if len(text) > source.max_document_bytes:
            what = f"a chunk without the end of {source.documents}"
            yield too_large(f"{unit.path}#{number}", what, source.max_document_bytes)
            return
        if not block:
            break
    if text:
        yield Document(f"{unit.label}#{number}", text)


def read_json_lines(unit: Unit, source: SourceSettings) -> Iterator[Document | BadRecord]:
    """Read a file of JSON objects, one document a line."""
    number = 0
    try:
        with open_decompressed(Path(unit.path)) as file:
            for number, line in enumerate(_lines(file, source.max_document_bytes), 1):
                if line is None:
                    place = f"{unit.path}:{number}"
                    yield too_large(place, "a line", source.max_document_bytes)
                elif line.strip():
                    yield _parse_line(line, unit, number, source)
    except READ_ERRORS as error:
        raise CorpusError(f"cannot read {unit.path} after line {number}: {error}") from error


def _lines(file: Reader, limit: int) -> Iterator[bytes | None]:
    """Lines of a file; None in place of one of more than `limit` bytes, which is passed over."""
    while line := file.readline(limit + 1):
        if len(line) <= limit or line.endswith(b"\n"):
            yield line
            continue
        while (rest := file.readline(_BLOCK)) and not rest.endswith(b"\n"):
            pass
        yield None


def _parse_line(
    line: bytes, unit: Unit, number: int, source: SourceSettings
) -> Document | BadRecord:
    place = f"{unit.path}:{number}"
    if mostly_brackets(line):
        return BadRecord(place, "a long line that is mostly brackets, which would fill the memory")
    try:
        record: Any = json.loads(line)
        if _may_repeat(line, source):
            json.loads(line, object_pairs_hook=refuse_repeats)
    except RecursionError:
        return BadRecord(place, "JSON that is nested too deeply")
    except ValueError as error:
        return BadRecord(place, f"not JSON ({error})")
    if not isinstance(record, dict):
        return BadRecord(place, "not a JSON object")
    return record_document(record, source, f"{unit.label}:{number}", place)


def _may_repeat(line: bytes, source: SourceSettings) -> bool:
    """True where the name of a text field stands more than once in a line."""
    names = {part for field in text_fields(source) for part in field.split(".")}
    return any(line.count(f'"{name}"'.encode()) > 1 for name in names)


def mostly_brackets(content: bytes) -> bool:
    """True for a long JSON text whose values would take many times its size."""
    return len(content) > _LONG and content.count(b"[") + content.count(b"{") > len(content) // 16
