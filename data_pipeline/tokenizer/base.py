"""The interface of every tokenizer, and the symbols of the three ids that the project needs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from functools import cached_property
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from data_pipeline.shards.manifest import TokenizerRecord

PAD, MASK, DOC = "<pad>", "<mask>", "<doc>"


class Tokenizer(ABC):
    """Encoder and decoder of text; ids are ints below `vocab_size`."""

    kind: ClassVar[Literal["sentencepiece", "huggingface"]]
    vocab_size: int
    pad_id: int
    mask_id: int
    doc_id: int
    never_targets: tuple[int, ...]
    """Ids that no training target can take: pad, mask, unk, bos, eos, other control symbols."""
    sha256: str
    """Hash of the file."""
    pieces_sha256: str
    """Hash of what determines encoding: pieces, scores, normaliser and appended ids."""

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without any special id."""

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; special ids are dropped, broken UTF-8 becomes U+FFFD."""

    @abstractmethod
    def piece(self, token_id: int) -> str:
        """Vocabulary entry of one id, for people to read."""

    @abstractmethod
    def _piece_bytes(self, token_id: int) -> int:
        """UTF-8 bytes that one id contributes to decoded text, inside a document."""

    def decode_visible(self, ids: Iterable[int]) -> str:
        """Text of `ids` in which mask, document separator and pad are written out."""
        visible = {self.pad_id: PAD, self.mask_id: MASK, self.doc_id: DOC}
        parts: list[str] = []
        run: list[int] = []
        decode = self.decode
        for token in map(int, ids):
            if token in visible:
                parts += [decode(run), visible[token]]
                run = []
                decode = self.decode if token == self.doc_id else self._decode_inside
            else:
                run.append(token)
        return "".join([*parts, decode(run)])

    def _decode_inside(self, ids: Iterable[int]) -> str:
        """Text of ids that stand in the middle of a document."""
        return self.decode(ids)

    def token_bytes(self) -> NDArray[np.int64]:
        """UTF-8 bytes each id contributes to text, int64 [vocab_size]: exact bits per byte.

        The first token of a document contributes `prefix_bytes` less.
        """
        return np.array([self._piece_bytes(i) for i in range(self.vocab_size)], np.int64)

    @cached_property
    def prefix_bytes(self) -> int:
        """Bytes of the space that encoding puts before a document and decoding drops; mostly 0."""
        return max(0, sum(map(self._piece_bytes, self.encode("a"))) - len("a"))

    @property
    def record(self) -> TokenizerRecord:
        """Entry of this tokenizer in a manifest."""
        return TokenizerRecord(
            kind=self.kind,
            sha256=self.sha256,
            pieces_sha256=self.pieces_sha256,
            vocab_size=self.vocab_size,
            pad_id=self.pad_id,
            mask_id=self.mask_id,
            doc_id=self.doc_id,
            never_targets=self.never_targets,
        )
