"""Encoding is lossless, specials cannot be typed, training is deterministic."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from data_pipeline.corpus.builtin import builtin_documents
from data_pipeline.corpus.source import SourceSettings
from data_pipeline.errors import TokenizerError
from data_pipeline.prepare.prepare import prepare
from data_pipeline.prepare.settings import PrepareSettings, TokenizerSettings
from data_pipeline.shards.manifest import Manifest
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


@pytest.fixture(scope="module")
def lengths(tokenizer: Tokenizer) -> NDArray[np.int64]:
    return tokenizer.token_bytes()


@pytest.mark.parametrize("text", PROBES)
def test_round_trip_is_lossless(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(text=st.text(max_size=60))
@settings(max_examples=150, deadline=None)
def test_round_trip_of_any_text(
    tokenizer: Tokenizer, lengths: NDArray[np.int64], text: str
) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not set(ids) & {*tokenizer.never_targets, tokenizer.doc_id}
    assert lengths[ids].sum() == len(text.encode())


def test_special_ids_are_shown_only_on_request(tokenizer: Tokenizer) -> None:
    ids = [*tokenizer.encode("one"), tokenizer.mask_id, *tokenizer.encode(" two")]
    ids += [tokenizer.doc_id, tokenizer.pad_id]
    assert tokenizer.decode(ids) == "one two"
    assert tokenizer.decode_visible(ids) == "one<mask> two<doc><pad>"
    assert tokenizer.never_targets == (0, 1, 2, 3, 4)
    assert (tokenizer.pad_id, tokenizer.mask_id, tokenizer.doc_id) == (0, 4, 5)


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_training_is_deterministic(texts: list[str], model_type: str) -> None:
    short = [text[:3000] for text in texts]
    models = [
        train_sentencepiece(short, vocab_size=600, model_type=model_type)  # type: ignore[arg-type]
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
    with pytest.raises(TokenizerError, match=r"lower vocab_size to 269 or less, or give"):
        train_sentencepiece(["too little text"], vocab_size=5000)
    with pytest.raises(TokenizerError, match="of 500 ids"):
        train_sentencepiece([], vocab_size=500)


FAITHFUL = {
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "byte_fallback": True,
}


def plain_model(texts: list[str], **settings: Any) -> bytes:
    """A model of 600 ids as other projects train them; settings are the trainer's."""
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text[:500] for text in texts),
        model_writer=out,
        vocab_size=600,
        num_threads=1,
        minloglevel=2,
        **settings,
    )
    return out.getvalue()


@pytest.mark.parametrize("dummy_prefix", [True, False])
def test_missing_special_ids_are_appended(texts: list[str], dummy_prefix: bool) -> None:
    model = plain_model(texts, **FAITHFUL, add_dummy_prefix=dummy_prefix)
    tokenizer = SentencePieceTokenizer(model, "test")
    assert tokenizer.vocab_size == 603
    assert (tokenizer.pad_id, tokenizer.mask_id, tokenizer.doc_id) == (600, 601, 602)
    assert [tokenizer.piece(i) for i in (600, 601, 602)] == ["<pad>", "<mask>", "<doc>"]
    assert tokenizer.never_targets == (0, 1, 2, 600, 601)
    assert tokenizer.token_bytes()[[0, 1, 2, 600, 601, 602]].tolist() == [0] * 6
    for text in PROBES:
        ids = tokenizer.encode(text)
        assert not set(ids) & {*tokenizer.never_targets, tokenizer.doc_id}
        if "\u2581" in text and dummy_prefix:
            continue  # the model puts a space before every part
        assert tokenizer.decode([tokenizer.mask_id, *ids, tokenizer.doc_id]) == text
        assert tokenizer.token_bytes()[ids].sum() == len(text.encode()) + (
            dummy_prefix and text != ""
        )


@pytest.mark.parametrize("dummy_prefix", [True, False])
def test_spaces_beside_an_appended_mask_are_shown(texts: list[str], dummy_prefix: bool) -> None:
    model = plain_model(texts, **FAITHFUL, add_dummy_prefix=dummy_prefix)
    tokenizer = SentencePieceTokenizer(model, "test")
    ids = tokenizer.encode("one two")
    space = max(n for n, i in enumerate(ids) if tokenizer.piece(i).startswith("\u2581"))
    masked = [*ids[:space], tokenizer.mask_id, *ids[space:]]
    shown = tokenizer.decode_visible([*masked, tokenizer.doc_id, *ids, tokenizer.pad_id])
    assert shown == "one<mask> two<doc>one two<pad>"


def test_only_missing_special_ids_are_appended_in_a_fixed_order(texts: list[str]) -> None:
    """A user-defined `<mask>` can be typed, so it is none; other control symbols are no targets."""
    model = plain_model(
        texts,
        **FAITHFUL,
        pad_id=3,
        control_symbols=["<doc>", "<cls>"],
        user_defined_symbols=["<mask>"],
    )
    tokenizer = SentencePieceTokenizer(model, "test")
    typed = tokenizer.encode("a <mask> b <cls>")
    assert (tokenizer.pad_id, tokenizer.doc_id, tokenizer.mask_id) == (3, 4, 600)
    assert tokenizer.vocab_size == 601
    assert tokenizer.never_targets == (0, 1, 2, 3, 5, 600)
    assert not set(typed) & {*tokenizer.never_targets, tokenizer.doc_id}
    assert tokenizer.decode(typed) == "a <mask> b <cls>"


def test_the_identity_covers_appended_ids(texts: list[str]) -> None:
    """The same model file is another tokenizer where other ids stand behind its vocabulary."""
    model = plain_model(texts, **FAITHFUL)
    tokenizer = SentencePieceTokenizer(model, "test")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SentencePieceTokenizer, "_special", lambda *_: 5)
        bare = SentencePieceTokenizer(model, "test")
    assert tokenizer.sha256 == bare.sha256
    assert tokenizer.pieces_sha256 != bare.pieces_sha256
    assert tokenizer.record == SentencePieceTokenizer(model, "elsewhere").record


@pytest.mark.parametrize("faithful", [True, False])
def test_a_preparation_with_a_plain_model_counts_what_it_changes(
    texts: list[str], tmp_path: Path, faithful: bool
) -> None:
    """The trainer's defaults join spaces; the manifest says how many documents that touched."""
    lines = [" ".join(re.findall("[A-Za-z0-9]+", text)[:40]) for text in texts]
    lines = [line for line in dict.fromkeys(lines) if " " in line]
    spaced = [line.replace(" ", "  ", 1) for line in lines[:7]] + lines[7:]
    source = tmp_path / "text.jsonl"
    source.write_text("".join(json.dumps({"text": line}) + "\n" for line in spaced))
    settings = FAITHFUL if faithful else {"character_coverage": 1.0}
    (tmp_path / "plain.model").write_bytes(plain_model(lines, **settings, hard_vocab_limit=False))
    prepared = prepare(
        PrepareSettings(
            out=tmp_path / "out",
            sources=(SourceSettings(path=str(source)),),
            tokenizer=TokenizerSettings(path=tmp_path / "plain.model"),
            validation_fraction=0.2,
            workers=1,
        )
    )
    found = [Manifest.load(path) for path in (prepared.train, prepared.validation)]
    tokenizer = load_tokenizer(prepared.tokenizer)
    assert sum(m.round_trip.checked for m in found) == len(spaced)
    assert sum(m.round_trip.failed for m in found) == (0 if faithful else 7)
    assert all(m.tokenizer == tokenizer.record for m in found)
    assert tokenizer.doc_id == tokenizer.vocab_size - 1
