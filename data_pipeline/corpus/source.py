"""Settings of one source of documents: where the text is and how its files are read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Format = Literal["auto", "txt", "jsonl", "json", "csv", "parquet"]
Splitting = Literal["files", "paragraphs", "lines"]


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
    """Field of a JSON line or column that holds the text; `data.text` is nested, `title,text`
    joins two fields with a blank line between them."""
    id_field: str = "id"
    """Field that holds the document's id; where absent, file and line number stand in."""
    split: Splitting | None = None
    """Plain text: a document is a file, a paragraph (up to a blank line) or a line; null takes
    files, or paragraphs where `chunk_characters` is set."""
    chunk_characters: Annotated[int, Field(ge=0)] = 0
    """Plain text: paragraphs or lines are joined to documents of at least this many characters."""
    license: str = "unknown"
    max_document_bytes: Annotated[int, Field(ge=1, le=1 << 31)] = 64 << 20
    """Largest document, and largest line of JSON lines; a larger one is a malformed record. Tokens
    of a document take about ten times its bytes in memory, for each process."""

    @model_validator(mode="after")
    def _chunks_need_a_split(self) -> SourceSettings:
        if self.split == "files" and self.chunk_characters:
            raise ValueError("split is files, so chunk_characters must be 0")
        return self

    @property
    def documents(self) -> Splitting:
        """Kind of part of a plain text file that is one document."""
        return self.split or ("paragraphs" if self.chunk_characters else "files")

    @property
    def label(self) -> str:
        """Name for people."""
        return self.name or Path(self.path).name or self.path
