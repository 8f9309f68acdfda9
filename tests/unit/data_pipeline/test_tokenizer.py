"""Encoding is lossless, specials cannot be typed, training is deterministic."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.builtin_corpus import builtin_documents
from data_pipeline.errors import TokenizerError
from data_pipeline.tokenizer import (
    SentencePieceTokenizer,
    Tokenizer,
    load_tokenizer,
    train_sentencepiece,
)

PROBES = [
    "a  b\n\n\tc  ",
    " lead",
    "▁x ▁▁ y▁",
    "x\r\ny",
    "ﬁ ½ é e\u0301 \u00a0nb\u200b",
    "日本 🙂",
    "\x00z",
    "12345",
    "    if x:\n        y",
    "<mask> <doc> <pad> <s>",
    "",
    "\ufeffx",
]


@pytest.fixture(scope="module")
def texts() -> list[str]:
    documents = builtin_documents()
    return [text for _, (_, text) in zip(range(60), documents, strict=False)]


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def tokenizer(request: pytest.FixtureRequest, texts: list[str]) -> Tokenizer:
    model = train_sentencepiece(texts, vocab_size=1000, model_type=request.param)
    return SentencePieceTokenizer(model, "test")


@pytest.mark.parametrize("text", PROBES)
def test_round_trip_is_lossless(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(text=st.text(max_size=60))
@settings(max_examples=150, deadline=None)
def test_round_trip_of_any_text(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not set(ids) & {*tokenizer.never_targets, tokenizer.doc_id}
    assert tokenizer.token_bytes()[ids].sum() == len(text.encode())


def test_special_ids_are_shown_only_on_request(tokenizer: Tokenizer) -> None:
    ids = [*tokenizer.encode("one"), tokenizer.mask_id, *tokenizer.encode(" two")]
    ids += [tokenizer.doc_id, tokenizer.pad_id]
    assert tokenizer.decode(ids) == "one two"
    assert tokenizer.decode_visible(ids) == "one<mask> two<doc><pad>"
    assert tokenizer.never_targets == (0, 1, 2, 3, 4)
    assert (tokenizer.pad_id, tokenizer.mask_id, tokenizer.doc_id) == (0, 4, 5)


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_training_is_deterministic(texts: list[str], model_type: str) -> None:
    models = [
        train_sentencepiece(texts, vocab_size=600, model_type=model_type)  # type: ignore[arg-type]
        for _ in range(2)
    ]
    assert models[0] == models[1]


def test_file_hash_and_identity(tmp_path: Path, texts: list[str]) -> None:
    """The identity ignores how many threads made a BPE model; the file hash does not."""
    one, two = (
        SentencePieceTokenizer(
            train_sentencepiece(texts, vocab_size=600, model_type="bpe", num_threads=n), "test"
        )
        for n in (1, 2)
    )
    assert one.sha256 != two.sha256
    assert one.pieces_sha256 == two.pieces_sha256
    other = train_sentencepiece(texts, vocab_size=601, model_type="bpe")
    (tmp_path / "other.model").write_bytes(other)
    assert load_tokenizer(tmp_path / "other.model").pieces_sha256 != one.pieces_sha256


def test_unusable_tokenizers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="cannot read"):
        load_tokenizer(tmp_path / "none.model")
    (tmp_path / "bad.model").write_bytes(b"not a model")
    with pytest.raises(TokenizerError, match="not a SentencePiece model"):
        load_tokenizer(tmp_path / "bad.model")
    with pytest.raises(TokenizerError, match="lower vocab_size or give more text"):
        train_sentencepiece(["too little text"], vocab_size=5000)
    with pytest.raises(TokenizerError, match="of 500 ids"):
        train_sentencepiece([], vocab_size=500)
