"""Files of the sources in a fixed order, and the files beside them that no reader knows.

Links are followed and every folder is listed once, so that a loop of links ends. A folder that
cannot be listed is an error: text would be missing without a word.
"""

from __future__ import annotations

import errno
import os
from collections import Counter, deque
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from data_pipeline.corpus.compression import COMPRESSED
from data_pipeline.corpus.document import Unit, printable
from data_pipeline.corpus.source import SourceSettings
from data_pipeline.errors import CorpusError

BUILTIN = "builtin"
DATASET = "hf:"
_EXTENSIONS = {
    ".txt": "txt",
    ".text": "txt",
    ".md": "txt",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
}
_LONGEST_ENDING = 20


class Listing(NamedTuple):
    """Units of all sources, and how many files of which ending each source leaves out."""

    units: list[Unit]
    ignored: list[dict[str, int]]


def list_sources(sources: tuple[SourceSettings, ...]) -> Listing:
    """List the units of all sources, in a fixed order, and count the files that are ignored.

    CorpusError for sources that are missing, unreadable or hold no file that can be read.
    """
    units: list[Unit] = []
    ignored: list[dict[str, int]] = []
    for index, source in enumerate(sources):
        left_out: Counter[str] = Counter()
        if source.path == BUILTIN or source.path.startswith(DATASET):
            found = [Unit(index, source.path, source.path, 0)]
        else:
            files = _files(Path(source.path), source, left_out)
            found = [Unit(index, str(path), label, size) for path, label, size in files]
        if not found:
            counts = ", ".join(f"{n} {ending}" for ending, n in sorted(left_out.items()))
            raise CorpusError(
                f"{source.path} holds no file that can be read ({counts or 'it is empty'}); known "
                f"endings: {', '.join(sorted(_EXTENSIONS))}, each also with "
                f"{', '.join(COMPRESSED)}, and .parquet"
            )
        units += found
        ignored.append(dict(sorted(left_out.items())))
    return Listing(units, ignored)


def format_of(path: Path, source: SourceSettings) -> str | None:
    """Format of a file by its settings or its endings; None if unknown."""
    if source.format != "auto":
        return source.format
    suffixes = [s.lower() for s in path.suffixes]
    if suffixes and suffixes[-1] == ".parquet":
        return "parquet"
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return _EXTENSIONS.get(suffixes[-1]) if suffixes else None


def _files(
    path: Path, source: SourceSettings, ignored: Counter[str]
) -> Iterator[tuple[Path, str, int]]:
    """Readable files of a source with their labels and sizes; the others are counted."""
    if path.is_file():
        if format_of(path, source) is None:
            raise CorpusError(
                f"{path}: unknown ending; give the source a format (txt, jsonl, json, csv or "
                "parquet)"
            )
        yield path, _label(path.name), path.stat().st_size
        return
    if not path.is_dir():
        raise CorpusError(f"no such file or folder: {path}")
    for full in _walk(path):
        if full.name.startswith("."):
            ignored["hidden"] += 1
        elif format_of(full, source) is None and not is_dangling(full):
            ignored[_ending(full)] += 1
        else:
            yield full, _label(full.relative_to(path).as_posix()), _size(full)


def _walk(root: Path) -> Iterator[Path]:
    """Files below a folder in name order; linked folders follow, each folder once."""
    seen = {_identity(root)}
    links: deque[Path] = deque()
    waiting = [root]
    while waiting or links:
        if not waiting:
            link = links.popleft()
            if _identity(link) in seen:
                continue
            seen.add(_identity(link))
            waiting.append(link)
        folder = waiting.pop()
        folders: list[Path] = []
        for entry in _entries(folder):
            path = folder / entry.name
            if not _is_folder(entry, path):
                yield path
            elif entry.is_symlink():
                links.append(path)
            elif _identity(path) not in seen:
                seen.add(_identity(path))
                folders.append(path)
        waiting += reversed(folders)


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as found:
            return sorted(found, key=lambda entry: entry.name)
    except OSError as error:
        raise CorpusError(
            f"cannot list the folder {folder}: {error.strerror}; make it readable, or name the "
            "files to read"
        ) from None


def _is_folder(entry: os.DirEntry[str], path: Path) -> bool:
    try:
        return entry.is_dir()
    except OSError as error:
        if error.errno == errno.ELOOP:
            return False
        raise CorpusError(f"cannot follow the link {path}: {error.strerror}") from None


def _identity(folder: Path) -> tuple[int, int]:
    """Device and number of a folder, the same behind every link to it."""
    try:
        found = folder.stat()
    except OSError as error:
        raise CorpusError(f"cannot list the folder {folder}: {error.strerror}") from None
    return found.st_dev, found.st_ino


def _size(path: Path) -> int:
    """Bytes of a file; 0 for a link that leads nowhere, which its reader reports."""
    if is_dangling(path):
        return 0
    try:
        return path.stat().st_size
    except OSError as error:
        raise CorpusError(f"cannot read {path}: {error.strerror}") from None


def is_dangling(path: Path) -> bool:
    """True for a link that leads nowhere, or in a circle."""
    return path.is_symlink() and not os.path.exists(path)


def _label(name: str) -> str:
    """Name of a file in ids: bytes that are no UTF-8 are escaped."""
    return printable(name)


def _ending(path: Path) -> str:
    """Ending of a file for people, with that inside a compressed one."""
    inner = path.suffix.lower() in COMPRESSED
    ending = "".join(path.suffixes[-2:] if inner else path.suffixes[-1:]).lower()
    short = ending and len(ending) <= _LONGEST_ENDING and " " not in ending
    return printable(ending) if short else "without ending"
