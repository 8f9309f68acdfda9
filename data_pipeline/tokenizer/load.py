"""Opening a tokenizer file of any kind."""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from data_pipeline.errors import TokenizerError
from data_pipeline.regular import read_regular
from data_pipeline.shards.fields import describe
from data_pipeline.tokenizer.base import Tokenizer
from data_pipeline.tokenizer.huggingface import HuggingFaceTokenizer
from data_pipeline.tokenizer.sentencepiece_model import SentencePieceTokenizer

LARGEST = 256 << 20
"""Bytes of the largest tokenizer file; those of published models have up to 40 MB."""


def load_tokenizer(path: Path) -> Tokenizer:
    """Open `path`: a `tokenizer.json` by its ending, any other file as a SentencePiece model.

    TokenizerError if it is missing or unusable.
    """
    path = Path(path)
    try:
        content = read_regular(path, LARGEST)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise TokenizerError(f"cannot read the tokenizer {path}: {reason}") from error
    kind = HuggingFaceTokenizer if path.suffix == ".json" else SentencePieceTokenizer
    try:
        tokenizer = kind(content, str(path))
        tokenizer.record  # noqa: B018  # raises where its ids are not those of a vocabulary
    except ValidationError as error:
        raise TokenizerError(f"{path} is no usable tokenizer:{describe(error)}") from None
    except (ValueError, TypeError, LookupError, AttributeError, OverflowError) as error:
        raise TokenizerError(f"{path} is no usable tokenizer: {error!r}") from None
    return tokenizer
