"""Values of the readers: units of a source, their documents, and records that cannot be read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Unit:
    """Part of a source that one reader reads by itself: a file, a dataset or the built-in text."""

    source: int
    """Index into the sources."""
    path: str
    label: str
    """Path relative to the source, for ids and messages."""
    bytes: int
    """Size on disk, 0 where unknown."""


@dataclass(frozen=True)
class Document:
    """One text, with an id by which a person can find it."""

    id: str
    text: str


@dataclass(frozen=True)
class BadRecord:
    """A record that could not be read."""

    place: str
    """File and line."""
    reason: str


def too_large(place: str, what: str, limit: int) -> BadRecord:
    """Bad record for a line or document of more than `limit` bytes."""
    return BadRecord(
        place,
        f"{what} of more than {limit:,} bytes; split it (chunk_characters, for plain text), or "
        "raise max_document_bytes",
    )


def document(name: Any, text: str, fallback: str, place: str, limit: int) -> Document | BadRecord:
    """Make a document with the id `name`, or `fallback` where there is none.

    A text that UTF-8 cannot write, or that takes more than `limit` bytes, gives a bad record at
    `place`.
    """
    try:
        if len(text.encode("utf-8")) > limit:
            return too_large(place, "a document", limit)
    except UnicodeEncodeError:
        return BadRecord(place, "the text holds half of a surrogate pair")
    return Document(printable(str(name)) if name is not None else fallback, text)


def printable(name: str) -> str:
    """Name in which halves of surrogate pairs, also those that stand for bytes, are escaped."""
    return name.encode("utf-8", "backslashreplace").decode()
