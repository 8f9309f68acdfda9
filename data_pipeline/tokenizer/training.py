"""Training a SentencePiece model: byte fallback, no normalisation, pieces within one script."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator
from typing import Literal

from data_pipeline.errors import TokenizerError
from data_pipeline.tokenizer.base import DOC, MASK

_CHUNK = 4000
_CONTROL = [MASK, DOC]
COVERAGE = 0.9995
"""Usual share of a text's characters that become pieces."""
FIXED_IDS = 256 + 4 + len(_CONTROL)
"""Ids that every model has: bytes, pad, unk, bos, eos and the control symbols."""
ModelType = Literal["unigram", "bpe"]


def train_sentencepiece(
    texts: Iterable[str],
    *,
    vocab_size: int,
    model_type: ModelType = "unigram",
    num_threads: int = 2,
    character_coverage: float = COVERAGE,
    exact: bool = True,
) -> bytes:
    """Train a model on `texts`; the same texts and settings give the same bytes.

    `num_threads` is part of the recipe: unigram pieces depend on it. `exact=False` allows fewer
    ids, where the text has not enough pieces for `vocab_size`. TokenizerError says which sizes the
    text allows.
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
            character_coverage=character_coverage,
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
            control_symbols=_CONTROL,
            hard_vocab_limit=exact,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise TokenizerError(
            f"cannot train a {model_type} tokenizer of {vocab_size} ids on this text: "
            + _reason(str(error))
        ) from error
    return out.getvalue()


def _reason(message: str) -> str:
    """Words for an error of the trainer, with one advice: the limit that it names."""
    if high := re.search(r"too high.*<= (\d+)", message, re.DOTALL):
        return f"it has too few pieces; lower vocab_size to {high[1]} or less, or give more text"
    if low := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return (
            f"it has too many characters; raise vocab_size to at least {low[1]}, or lower "
            "character_coverage"
        )
    if "sentences_.empty()" in message:
        return "there is no text"
    return message.rsplit("] ", 1)[-1].strip() or message


def _chunks(texts: Iterable[str]) -> Iterator[str]:
    """Pieces of at most 4,000 characters that end after a line or a space where there is one.

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
