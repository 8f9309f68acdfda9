"""SentencePiece models behind the common interface: the project's native kind.

Encoding with a model trained here is lossless, also for U+2581, which SentencePiece would turn into
a space: it is encoded as its three UTF-8 bytes. Other models may normalise text: preparations count
the documents that it changes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from hashlib import sha256
from typing import Any

from data_pipeline.errors import TokenizerError
from data_pipeline.tokenizer.base import DOC, MASK, PAD, Tokenizer

_SPACE_SYMBOL = "\u2581"


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model; pad, mask and document ids it lacks are appended to its ids."""

    kind = "sentencepiece"

    def __init__(self, model: bytes, origin: str) -> None:
        """Load the serialised `model` read from `origin`; TokenizerError if it is none."""
        import sentencepiece

        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=model)
        except Exception as error:  # the binding raises RuntimeError and its own classes
            raise TokenizerError(f"{origin} is not a SentencePiece model: {error}") from error
        if not model or not len(self._model):
            raise TokenizerError(f"{origin} is not a SentencePiece model: it holds no pieces")
        self._pieces = self.vocab_size = len(self._model)
        self._appended: list[str] = []
        self.pad_id = self._model.pad_id() if self._model.pad_id() >= 0 else self._special(PAD)
        self.mask_id, self.doc_id = self._special(MASK), self._special(DOC)
        kinds = (self._model.is_control, self._model.is_unknown, self._model.is_unused)
        silent = {i for i in range(self._pieces) if any(kind(i) for kind in kinds)}
        self.never_targets = tuple(sorted({*silent, self.pad_id, self.mask_id} - {self.doc_id}))
        self.sha256 = sha256(model).hexdigest()
        self.pieces_sha256 = _pieces_sha256(self._model, self._appended)
        bytes_of_symbol = [f"<0x{b:02X}>" for b in _SPACE_SYMBOL.encode()]
        self._escaped = [self._model.piece_to_id(piece) for piece in bytes_of_symbol]
        self._can_escape = all(self._model.is_byte(i) for i in self._escaped)

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without any special id."""
        if _SPACE_SYMBOL not in text or not self._can_escape:
            return self._model.encode(text)
        first, *rest = text.split(_SPACE_SYMBOL)
        ids: list[int] = self._model.encode(first)
        for part in rest:
            ids += [*self._escaped, *self._model.encode(part)]
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; special ids are dropped, broken UTF-8 becomes U+FFFD."""
        return self._model.decode([i for i in map(int, ids) if not self._is_appended(i)])

    def _decode_inside(self, ids: Iterable[int]) -> str:
        """Text with its leading space, which models with a dummy prefix drop when they decode."""
        start = self._model.unk_id()
        return self.decode([start, *ids]).removeprefix(self.decode([start]))

    def piece(self, token_id: int) -> str:
        """Vocabulary entry of one id, for people to read."""
        if self._is_appended(token_id):
            return self._appended[token_id - self._pieces]
        return self._model.id_to_piece(token_id)

    def _is_appended(self, token_id: int) -> bool:
        return self._pieces <= token_id < self.vocab_size

    def _piece_bytes(self, token_id: int) -> int:
        if self._is_appended(token_id):
            return 0
        if self._model.is_control(token_id) or self._model.is_unknown(token_id):
            return 0
        if self._model.is_byte(token_id):
            return 1
        return len(self.piece(token_id).replace(_SPACE_SYMBOL, " ").encode())

    def _special(self, symbol: str) -> int:
        """Id of a control symbol, else a new one: other kinds of pieces can be typed in text."""
        found = self._model.piece_to_id(symbol)
        if self._model.id_to_piece(found) == symbol and self._model.is_control(found):
            return found
        self._appended.append(symbol)
        self.vocab_size += 1
        return self.vocab_size - 1


def _pieces_sha256(model: Any, appended: list[str]) -> str:
    """Hash of pieces, scores, kinds, normaliser and appended ids, however the file was made."""
    from sentencepiece import sentencepiece_model_pb2 as messages

    proto = messages.ModelProto.FromString(model.serialized_model_proto())  # type: ignore[attr-defined]
    rows = [[piece.piece, piece.score, piece.type] for piece in proto.pieces]
    normalizer = proto.normalizer_spec
    rules = [
        proto.trainer_spec.model_type,
        proto.trainer_spec.byte_fallback,
        normalizer.precompiled_charsmap.hex(),
        normalizer.add_dummy_prefix,
        normalizer.remove_extra_whitespaces,
        normalizer.escape_whitespaces,
    ]
    content = [rows, rules, appended] if appended else [rows, rules]
    return sha256(json.dumps(content, ensure_ascii=True).encode()).hexdigest()
