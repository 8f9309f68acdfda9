"""Size of the vocabulary: estimated from the text before a tokenizer is trained on it.

Unless it is given, it grows with the square root of the text that the trainer sees: 500 ids up to
100 kB, twice as many for each fourfold text, 32,000 from 100 MB on. A piece is then seen some
hundred times, whatever the size of the text.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from data_pipeline.errors import TokenizerError
from data_pipeline.prepare.settings import LOWEST_COVERAGE, TokenizerSettings
from data_pipeline.tokenizer.training import FIXED_IDS

SMALLEST, LARGEST = 500, 32_000
LARGEST_FROM_BYTES = 100_000_000
_BLOCK = 1 << 22
_CODES = 0x110000


@dataclass(frozen=True)
class Vocabulary:
    """Vocabulary of a tokenizer to train, and the text that it is for."""

    size: int
    given: bool
    """True where the settings name the size."""
    text_bytes: int
    """UTF-8 bytes of the text that the trainer sees."""
    characters: int
    """Different characters that the trainer keeps, each as a piece."""

    @property
    def words(self) -> str:
        """The choice in one line, for people."""
        text = f"{_volume(self.text_bytes)} of text with {self.characters:,} different characters"
        if not self.given:
            return f"vocabulary: up to {self.size:,} ids for {text} (--vocab-size takes another)"
        usual = usual_size(self.text_bytes, self.characters)
        many = f"; {usual:,} are usual for so little" if self.size > 2 * usual else ""
        return f"vocabulary: {self.size:,} ids for {text}{many}"

    def to_dict(self) -> dict[str, Any]:
        """The choice as plain JSON."""
        return asdict(self)


def choose_vocabulary(texts: Iterable[str], settings: TokenizerSettings) -> Vocabulary:
    """Choose the size for `texts`, or check the given one; TokenizerError where it is too small."""
    size, counts = _count(texts)
    characters = _kept_characters(counts, settings.character_coverage)
    given = settings.vocab_size
    least = FIXED_IDS + characters
    if given is not None and given < least:
        common = FIXED_IDS + _kept_characters(counts, LOWEST_COVERAGE)
        bytes_for_rare = (
            f", or lower character_coverage ({settings.character_coverage}), which writes rarer "
            f"characters as bytes ({LOWEST_COVERAGE} needs {common} ids)"
        )
        raise TokenizerError(
            f"vocab_size {given} is too small for this text, whose {characters:,} characters need "
            f"{least} ids ({FIXED_IDS} for bytes and special ids, one for each character); raise "
            f"vocab_size to at least {least}{bytes_for_rare if common <= given else ''}"
        )
    chosen = usual_size(size, characters) if given is None else given
    return Vocabulary(chosen, given is not None, size, characters)


def usual_size(text_bytes: int, characters: int) -> int:
    """Ids for so much text: by its size, with room for a quarter more than its characters."""
    size, limit = LARGEST, LARGEST_FROM_BYTES
    while size > SMALLEST and text_bytes < limit:
        size, limit = size // 2, limit // 4
    while size < (FIXED_IDS + characters) * 5 // 4:
        size *= 2
    return size


def _volume(size: int) -> str:
    """Bytes in a unit that people read."""
    for unit, factor in (("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:.3g} {unit}"
    return f"{size} bytes"


def _count(texts: Iterable[str]) -> tuple[int, np.ndarray]:
    """UTF-8 bytes of texts, and the occurrences of every code point."""
    counts = np.zeros(_CODES, np.int64)
    held: list[str] = []
    length = total = 0

    def flush() -> None:
        codes = np.frombuffer("".join(held).encode("utf-32-le"), "<u4")
        counts[:] += np.bincount(codes, minlength=_CODES)

    for text in texts:
        held.append(text)
        length += len(text)
        total += len(text.encode())
        if length >= _BLOCK:
            flush()
            held, length = [], 0
    flush()
    return total, counts


def _kept_characters(counts: np.ndarray, coverage: float) -> int:
    """Number of characters that SentencePiece keeps: the most frequent up to the coverage.

    Its rule: a space counts as U+2581, NUL does not count, and tabs count but are no pieces.
    """
    counts = counts.copy()
    counts[0x2581] += counts[0x20]
    counts[[0, 0x20]] = 0
    found = np.flatnonzero(counts)
    if not len(found):
        return 0
    order = found[np.argsort(-counts[found], kind="stable")]
    before = np.concatenate([[0], np.cumsum(counts[order])[:-1]])
    shares = (before / counts.sum()).astype(np.float32)
    kept = order[shares < np.float32(coverage)]
    return len(kept) - int(0x09 in kept)
