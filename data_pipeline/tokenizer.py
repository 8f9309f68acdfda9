"""Text to token ids and back, behind one small interface; SentencePiece is the native kind.

Typed text can never become a special id: pad, mask and document separator are control symbols of
the model, or ids appended behind its vocabulary where an existing model has none. Encoding with a
model trained here is lossless, also for U+2581, which SentencePiece would turn into a space: it is
encoded as its three UTF-8 bytes. Other models may normalise text: preparations count what changed.
"""

from __future__ import annotations

import io
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from data_pipeline.errors import TokenizerError
from data_pipeline.shards.manifest import TokenizerRecord

PAD, MASK, DOC = "<pad>", "<mask>", "<doc>"
_SPACE_SYMBOL = "\u2581"
_CHUNK = 4000
ModelType = Literal["unigram", "bpe"]


class Tokenizer(ABC):
    """What the project needs from any tokenizer; ids are ints below `vocab_size`."""

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
        """The vocabulary entry of one id, for people to read."""

    @abstractmethod
    def _piece_bytes(self, token_id: int) -> int:
        """UTF-8 bytes that one id contributes to decoded text."""

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
        """UTF-8 bytes each id contributes to text, int64 [vocab_size]: exact bits per byte."""
        return np.array([self._piece_bytes(i) for i in range(self.vocab_size)], np.int64)

    @property
    def record(self) -> TokenizerRecord:
        """What a manifest keeps."""
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


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model; pad, mask and document ids it lacks are appended to its ids."""

    kind = "sentencepiece"

    def __init__(self, model: bytes, origin: str) -> None:
        """Load the serialised `model`; `TokenizerError` if it is none."""
        import sentencepiece

        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=model)
        except Exception as error:  # the binding raises RuntimeError and its own classes
            raise TokenizerError(f"{origin} is not a SentencePiece model: {error}") from error
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
        """Keeps a leading space, which models with a dummy prefix drop when they decode."""
        start = self._model.unk_id()
        return self.decode([start, *ids]).removeprefix(self.decode([start]))

    def piece(self, token_id: int) -> str:
        """The vocabulary entry of one id, for people to read."""
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
        """The control symbol's id, else a new one: other kinds of pieces can be typed in text."""
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


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer in `path`; `TokenizerError` if it is missing or unusable."""
    path = Path(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise TokenizerError(f"cannot read the tokenizer {path}: {error.strerror}") from error
    if path.suffix == ".json":
        from data_pipeline.huggingface_tokenizer import HuggingFaceTokenizer

        return HuggingFaceTokenizer(content, str(path))
    return SentencePieceTokenizer(content, str(path))


def train_sentencepiece(
    texts: Iterable[str],
    *,
    vocab_size: int,
    model_type: ModelType = "unigram",
    num_threads: int = 2,
) -> bytes:
    """Train a model on `texts`; the same texts and settings give the same bytes.

    `num_threads` is part of the recipe: unigram pieces depend on it.
    """
    import sentencepiece

    out = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_chunks(texts),
            model_writer=out,
            model_type=model_type,
            vocab_size=vocab_size,
            byte_fallback=True,
            character_coverage=0.9995,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            split_by_unicode_script=True,
            max_sentence_length=65536,
            input_sentence_size=2_000_000,
            shuffle_input_sentence=True,
            num_threads=num_threads,
            pad_id=0,
            unk_id=1,
            bos_id=2,
            eos_id=3,
            control_symbols=[MASK, DOC],
            hard_vocab_limit=True,
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).rsplit("] ", 1)[-1].strip() or "no text"
        raise TokenizerError(
            f"cannot train a {model_type} tokenizer of {vocab_size} ids on this text: {reason}; "
            "lower vocab_size or give more text"
        ) from error
    return out.getvalue()


def _chunks(texts: Iterable[str]) -> Iterator[str]:
    """Pieces of at most 4,000 characters, cut after a line or a space where there is one.

    Newlines stay inside, so that pieces may contain them.
    """
    for text in texts:
        start = 0
        while start < len(text):
            stop = min(start + _CHUNK, len(text))
            if stop < len(text):
                edge = max(text.rfind("\n", start, stop), text.rfind(" ", start, stop))
                stop = edge + 1 if edge > start else stop
            yield text[start:stop]
            start = stop
