"""Settings of one source of documents: where the text is and how its files are read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Format = Literal["auto", "txt", "jsonl", "parquet"]


class SourceSettings(BaseModel):
    """One source of documents."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str
    """A file, a folder (searched recursively, in name order), `builtin`, or `hf:NAME`."""
    name: str = ""
    """Name of the source in manifests and reports; default: the last part of `path`."""
    format: Format = "auto"
    """Format of the files; `auto` decides by the extension."""
    text_field: str = "text"
    """Field of a JSON line or column that holds the text."""
    id_field: str = "id"
    """Field that holds the document's id; where absent, file and line number stand in."""
    chunk_characters: Annotated[int, Field(ge=0)] = 0
    """Plain text: split files at blank lines into documents of at least this many characters; 0
    keeps each file one document."""
    license: str = "unknown"
    max_document_bytes: Annotated[int, Field(ge=1, le=1 << 31)] = 64 << 20
    """Largest document, and largest line of JSON lines; a larger one is a malformed record. Tokens
    of a document take about ten times its bytes in memory, for each process."""

    @property
    def label(self) -> str:
        """Name for people."""
        return self.name or Path(self.path).name or self.path
