"""Hugging Face `tokenizer.json` files behind the common interface.

Pad, mask and separator are taken from the file's added tokens where they exist and appended behind
its vocabulary where they do not. Text never encodes to them, because encoding recognises no special
token.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from functools import cached_property
from hashlib import sha256
from typing import Any

from data_pipeline.errors import TokenizerError
from data_pipeline.tokenizer.base import DOC, MASK, PAD, Tokenizer

_NAMES = {
    "pad": (PAD, "[PAD]", "<|padding|>", "<|pad|>"),
    "mask": (MASK, "[MASK]", "<|mask|>", "<|mdm_mask|>"),
    "doc": (DOC, "<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>"),
}

_BYTE = re.compile("<0x[0-9A-F]{2}>")
"""Piece of one byte, in vocabularies that fall back to bytes."""


class HuggingFaceTokenizer(Tokenizer):
    """Tokenizer of the `tokenizers` library; added special tokens are reachable only by id."""

    kind = "huggingface"

    def __init__(self, content: bytes, origin: str) -> None:
        """Load `tokenizer.json`; TokenizerError if it is damaged or the library is missing."""
        try:
            import tokenizers
        except ImportError:
            raise TokenizerError(
                f"{origin} needs tokenizers: pip install 'epochal[data]'"
            ) from None
        try:
            parsed: dict[str, Any] = json.loads(content)
            self._added = {t["content"]: t["id"] for t in parsed.get("added_tokens", [])}
            special = {t["id"] for t in parsed.get("added_tokens", []) if t.get("special")}
            plain = {**parsed, "added_tokens": [], "post_processor": None}
            self._encoder: Any = tokenizers.Tokenizer.from_str(json.dumps(plain))
            self._decoder: Any = tokenizers.Tokenizer.from_str(content.decode())
        except Exception as error:  # the binding raises bare Exception
            raise TokenizerError(f"{origin} is not a tokenizer.json: {error}") from error
        self.vocab_size = self._decoder.get_vocab_size(with_added_tokens=True)
        ids = [self._find(kind) for kind in ("pad", "mask", "doc")]
        self.pad_id, self.mask_id, self.doc_id = ids
        self.never_targets = tuple(sorted(({*special, self.pad_id, self.mask_id}) - {self.doc_id}))
        self._silent = {*special, *ids}
        self.sha256 = sha256(content).hexdigest()
        kept = {k: parsed.get(k) for k in ("model", "normalizer", "pre_tokenizer", "decoder")}
        kept["added"] = sorted(self._added.items())
        self.pieces_sha256 = sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()
        decoder = json.dumps(parsed.get("decoder"))
        self._byte_level = '"ByteLevel"' in decoder
        self._byte_fallback = '"ByteFallback"' in decoder

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without any special id."""
        return self._encoder.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; special ids are dropped."""
        kept = [int(i) for i in ids if int(i) not in self._silent]
        return self._decoder.decode(kept, skip_special_tokens=False)

    def piece(self, token_id: int) -> str:
        """Vocabulary entry of one id, for people to read."""
        return self._decoder.id_to_token(token_id) or f"<appended {token_id}>"

    def _piece_bytes(self, token_id: int) -> int:
        """UTF-8 bytes of a piece: its characters, its one byte, or what it adds to other text."""
        if token_id in self._silent:
            return 0
        piece = self.piece(token_id)
        if piece in self._added:
            return len(piece.encode())
        if self._byte_level:  # each character stands for one byte
            return len(piece)
        if self._byte_fallback and _BYTE.fullmatch(piece):
            return 1
        return len(self._decode_inside([token_id]).encode())

    def _decode_inside(self, ids: Iterable[int]) -> str:
        """Text with its leading space, which some decoders drop at the start of a document."""
        start, text = self._start
        return self.decode([*start, *ids]).removeprefix(text)

    @cached_property
    def _start(self) -> tuple[list[int], str]:
        """Ids of a text that other ids may follow, and the text."""
        ids = self.encode("a")
        return ids, self.decode(ids)

    def _find(self, kind: str) -> int:
        """Id of the first known name of a special token, else a new one."""
        for name in _NAMES[kind]:
            if name in self._added:
                return int(self._added[name])
        self.vocab_size += 1
        return self.vocab_size - 1
