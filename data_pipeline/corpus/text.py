"""Readers: files, folders and the built-in corpus as a stream of documents.

A source is cut into units (files), which are read independently and in parallel. A record that
cannot be read becomes a `BadRecord` with its place; the caller decides how many it tolerates.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.corpus.builtin import builtin_documents
from data_pipeline.corpus.compression import COMPRESSED, READ_ERRORS, open_decompressed
from data_pipeline.errors import CorpusError
from data_pipeline.prepare.settings import SourceSettings

BUILTIN = "builtin"
DATASET = "hf:"
_EXTENSIONS = {".txt": "txt", ".md": "txt", ".jsonl": "jsonl", ".ndjson": "jsonl"}


@dataclass(frozen=True)
class Document:
    """One text with a name that a person can find it by."""

    id: str
    text: str


@dataclass(frozen=True)
class BadRecord:
    """A record that could not be read."""

    place: str
    """File and line."""
    reason: str


@dataclass(frozen=True)
class Unit:
    """What one reader reads: a file of one source."""

    source: int
    """Index into the sources."""
    path: str
    label: str
    """Path relative to the source, for ids and messages."""
    bytes: int
    """Size on disk, 0 where unknown."""


def list_units(sources: tuple[SourceSettings, ...]) -> list[Unit]:
    """The files of all sources, in a fixed order; `CorpusError` for missing or empty sources."""
    units: list[Unit] = []
    for index, source in enumerate(sources):
        if source.path == BUILTIN or source.path.startswith(DATASET):
            units.append(Unit(index, source.path, source.path, 0))
            continue
        found = [
            Unit(index, str(path), label, path.stat().st_size)
            for path, label in _files(Path(source.path), source)
        ]
        if not found:
            raise CorpusError(
                f"{source.path} holds no file that can be read; known endings: "
                f"{', '.join(sorted(_EXTENSIONS))}, each also with .gz or .zst, and .parquet"
            )
        units += found
    return units


def read_unit(unit: Unit, source: SourceSettings) -> Iterator[Document | BadRecord]:
    """The documents of one unit in file order."""
    if unit.path == BUILTIN:
        yield from (Document(name, text) for name, text in builtin_documents())
        return
    if unit.path.startswith(DATASET):
        from data_pipeline.corpus.tabular import read_dataset

        yield from read_dataset(unit, source)
        return
    kind = _format(Path(unit.path), source)
    if kind == "txt":
        yield from _read_text(unit, source)
    elif kind == "jsonl":
        yield from _read_json_lines(unit, source)
    else:
        from data_pipeline.corpus.tabular import read_parquet

        yield from read_parquet(unit, source)


def _files(path: Path, source: SourceSettings) -> Iterator[tuple[Path, str]]:
    if path.is_file():
        if _format(path, source) is None:
            raise CorpusError(
                f"{path}: unknown ending; give the source a format (txt, jsonl or parquet)"
            )
        yield path, path.name
        return
    if not path.is_dir():
        raise CorpusError(f"no such file or folder: {path}")
    for folder, folders, files in os.walk(path):
        folders.sort()
        for name in sorted(files):
            full = Path(folder) / name
            if not name.startswith(".") and _format(full, source) is not None:
                yield full, full.relative_to(path).as_posix()


def _format(path: Path, source: SourceSettings) -> str | None:
    if source.format != "auto":
        return source.format
    suffixes = [s.lower() for s in path.suffixes]
    if suffixes and suffixes[-1] == ".parquet":
        return "parquet"
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return _EXTENSIONS.get(suffixes[-1]) if suffixes else None


def _read_text(unit: Unit, source: SourceSettings) -> Iterator[Document | BadRecord]:
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
    """Cut after blank lines as soon as a chunk has enough characters; the chunks join to `text`."""
    start = 0
    for match in re.finditer(r"\n[ \t\r]*\n\s*", text):
        if match.end() - start >= characters and match.end() < len(text):
            yield text[start : match.end()]
            start = match.end()
    if start < len(text):
        yield text[start:]


def _read_json_lines(unit: Unit, source: SourceSettings) -> Iterator[Document | BadRecord]:
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


def document(name: Any, text: str, fallback: str, place: str) -> Document | BadRecord:
    """A document, or a bad record when the text cannot be written as UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return BadRecord(place, "the text holds half of a surrogate pair")
    return Document(str(name) if name is not None else fallback, text)
