"""Opening a tokenizer file of any kind."""

from __future__ import annotations

from pathlib import Path

from data_pipeline.errors import TokenizerError
from data_pipeline.tokenizer.base import Tokenizer
from data_pipeline.tokenizer.huggingface import HuggingFaceTokenizer
from data_pipeline.tokenizer.sentencepiece_model import SentencePieceTokenizer


def load_tokenizer(path: Path) -> Tokenizer:
    """Open `path`: a `tokenizer.json` by its ending, any other file as a SentencePiece model.

    TokenizerError if it is missing or unusable.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise TokenizerError(f"cannot read the tokenizer {path}: {error.strerror}") from error
    kind = HuggingFaceTokenizer if path.suffix == ".json" else SentencePieceTokenizer
    return kind(content, str(path))
