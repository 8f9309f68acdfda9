"""Units of the sources: list them in a fixed order, read each with the reader of its format.

Units are read independently and in parallel. A record that cannot be read becomes a `BadRecord`
with its place; the caller decides how many it tolerates.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from data_pipeline.corpus.builtin import builtin_documents
from data_pipeline.corpus.compression import COMPRESSED
from data_pipeline.corpus.document import BadRecord, Document, Unit
from data_pipeline.corpus.source import SourceSettings
from data_pipeline.corpus.tabular import read_dataset, read_parquet
from data_pipeline.corpus.text import read_json_lines, read_text
from data_pipeline.errors import CorpusError

BUILTIN = "builtin"
DATASET = "hf:"
_EXTENSIONS = {".txt": "txt", ".md": "txt", ".jsonl": "jsonl", ".ndjson": "jsonl"}
_READERS = {"txt": read_text, "jsonl": read_json_lines, "parquet": read_parquet}


def list_units(sources: tuple[SourceSettings, ...]) -> list[Unit]:
    """List the units of all sources, in a fixed order.

    CorpusError for sources that are missing or hold no file that can be read.
    """
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
    """Read the documents of one unit in file order; CorpusError for a damaged file."""
    if unit.path == BUILTIN:
        return (Document(name, text) for name, text in builtin_documents())
    if unit.path.startswith(DATASET):
        return read_dataset(unit, source)
    kind = _format(Path(unit.path), source)
    assert kind is not None, "list_units names only files that can be read"
    return _READERS[kind](unit, source)


def _files(path: Path, source: SourceSettings) -> Iterator[tuple[Path, str]]:
    """Readable files of a source in name order, with their labels."""
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
    """Format of a file by its settings or its endings; None if unknown."""
    if source.format != "auto":
        return source.format
    suffixes = [s.lower() for s in path.suffixes]
    if suffixes and suffixes[-1] == ".parquet":
        return "parquet"
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return _EXTENSIONS.get(suffixes[-1]) if suffixes else None
