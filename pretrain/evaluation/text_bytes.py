"""UTF-8 bytes of the text that scored tokens encode, exact for any part of a pool."""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from data_pipeline.stream.stream import Stream
from data_pipeline.tokenizer import Tokenizer
from pretrain.batch import CleanBatch


class TextBytes:
    """Counter of the bytes that the valid tokens of a batch encode.

    A separator encodes none, whether it is scored (packed documents) or not (masked ones). Where
    the tokenizer changes text (it joins spaces, or has no piece for a character), the bytes are
    those of the decoded text, without its unknown characters.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._doc_id = tokenizer.doc_id

    @cached_property
    def _each(self) -> Tensor:
        """Bytes of each id, int64 [vocab_size]; a second of work for a large vocabulary."""
        return torch.from_numpy(self._tokenizer.token_bytes())

    def count(self, clean: CleanBatch, stream: Stream) -> Tensor:
        """Bytes of each row of a batch that `stream` delivered, int64 [b]."""
        encoded = torch.where(clean.valid, self._each[clean.tokens], 0)
        prefix = self._tokenizer.prefix_bytes
        if prefix:
            opens = torch.zeros_like(clean.valid)
            opens[:, 1:] = clean.tokens[:, :-1] == self._doc_id
            opens[:, 0] = self._opens_document(clean.position, stream)
            opens &= clean.valid & (encoded > 0)  # a separator opens nothing
            encoded -= prefix * opens
        return encoded.sum(dim=1)

    def _opens_document(self, position: Tensor, stream: Stream) -> Tensor:
        """True where the row at a position begins with the first token of a document, bool [b]."""
        opens = np.zeros(len(position), bool)
        inside = position.numpy() < stream.total_positions
        parts, sequences = stream.sequences_at(position.numpy()[inside])
        pools = [part.pool for _, part in stream.parts]
        starts = sequences * stream.seq_length
        opens[inside] = [
            start == 0 or pools[part].tokens(start - 1, start)[0] == self._doc_id
            for part, start in zip(parts.tolist(), starts.tolist(), strict=True)
        ]
        return torch.from_numpy(opens)
