"""Documents and bad records of a source, without tokenizer or pool."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data_pipeline.corpus.document import BadRecord, Document
from data_pipeline.corpus.listing import list_sources
from data_pipeline.corpus.source import SourceSettings
from data_pipeline.corpus.units import read_unit


def read_source(path: Path, **settings: Any) -> tuple[list[Document], list[BadRecord]]:
    """Read everything at a path."""
    source = SourceSettings(path=str(path), **settings)
    items = [i for unit in list_sources((source,)).units for i in read_unit(unit, source)]
    documents = [item for item in items if isinstance(item, Document)]
    return documents, [item for item in items if isinstance(item, BadRecord)]


def texts(path: Path, **settings: Any) -> list[str]:
    """Texts of a source that holds no bad record."""
    documents, bad = read_source(path, **settings)
    assert not bad
    return [document.text for document in documents]
