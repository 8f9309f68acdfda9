"""Reading of units, each with the reader of its format.

Units are read independently and in parallel. A record that cannot be read becomes a `BadRecord`
with its place; the caller decides how many it tolerates.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from data_pipeline.corpus.builtin import builtin_documents
from data_pipeline.corpus.csv_file import read_csv
from data_pipeline.corpus.document import BadRecord, Document, Unit
from data_pipeline.corpus.json_file import read_json
from data_pipeline.corpus.listing import BUILTIN, DATASET, format_of, is_dangling
from data_pipeline.corpus.source import SourceSettings
from data_pipeline.corpus.tabular import read_dataset, read_parquet
from data_pipeline.corpus.text import read_json_lines, read_text

_READERS = {
    "txt": read_text,
    "jsonl": read_json_lines,
    "json": read_json,
    "csv": read_csv,
    "parquet": read_parquet,
}


def read_unit(unit: Unit, source: SourceSettings) -> Iterator[Document | BadRecord]:
    """Read the documents of one unit in file order; CorpusError for a damaged file."""
    if unit.path == BUILTIN:
        return (Document(name, text) for name, text in builtin_documents())
    if unit.path.startswith(DATASET):
        return read_dataset(unit, source)
    path = Path(unit.path)
    if is_dangling(path):
        return iter([BadRecord(unit.path, "the link leads nowhere")])
    kind = format_of(path, source)
    assert kind is not None, "only files that can be read are listed"
    return _READERS[kind](unit, source)
