"""Hugging Face `tokenizer.json`: lossless, specials cannot be typed, pools of it are whole."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from data_pipeline.corpus.source import SourceSettings
from data_pipeline.errors import TokenizerError
from data_pipeline.prepare.prepare import prepare
from data_pipeline.prepare.settings import PrepareSettings, TokenizerSettings
from data_pipeline.shards.manifest import Manifest
from data_pipeline.tokenizer import Tokenizer, load_tokenizer

tokenizers = pytest.importorskip("tokenizers", reason="needs the data extra")


@pytest.fixture(scope="module")
def json_file(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE with an end-of-text token, as the field's checkpoints have it."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(texts, trainer)
    path = tmp_path_factory.mktemp("hf") / "tokenizer.json"
    model.save(str(path))
    return path


@pytest.fixture(scope="module")
def tokenizer(json_file: Path) -> Tokenizer:
    return load_tokenizer(json_file)


@pytest.fixture(scope="module")
def lengths(tokenizer: Tokenizer) -> NDArray[np.int64]:
    return tokenizer.token_bytes()


@given(text=st.text(max_size=60))
@settings(max_examples=150, deadline=None)
def test_round_trip_of_any_text(
    tokenizer: Tokenizer, lengths: NDArray[np.int64], text: str
) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not set(ids) & {*tokenizer.never_targets, tokenizer.doc_id}
    assert lengths[ids].sum() == len(text.encode())


def test_specials_cannot_be_typed(tokenizer: Tokenizer) -> None:
    assert tokenizer.doc_id not in tokenizer.encode("a <|endoftext|> b <mask>")
    assert tokenizer.decode(tokenizer.encode("a <|endoftext|> b")) == "a <|endoftext|> b"
    assert tokenizer.vocab_size == 602  # pad and mask are appended
    assert tokenizer.never_targets == (600, 601)
    ids = [*tokenizer.encode("x"), tokenizer.mask_id, tokenizer.doc_id, tokenizer.pad_id]
    assert tokenizer.decode_visible(ids) == "x<mask><doc><pad>"


def test_broken_tokenizer_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(TokenizerError, match=r"not a tokenizer\.json"):
        load_tokenizer(tmp_path / "tokenizer.json")


def test_a_pool_names_its_tokenizer(tmp_path: Path, texts: list[str], json_file: Path) -> None:
    source = tmp_path / "a.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[:40]))
    prepared = prepare(
        PrepareSettings(
            out=tmp_path / "out",
            sources=(SourceSettings(path=str(source)),),
            tokenizer=TokenizerSettings(path=json_file),
            validation_fraction=0.2,
            workers=1,
        )
    )
    assert prepared.tokenizer.name == "tokenizer.json"
    for path in (prepared.train, prepared.validation):
        manifest = Manifest.load(path)
        assert manifest.tokenizer == load_tokenizer(json_file).record
        assert manifest.tokenizer.kind == "huggingface"
        assert manifest.round_trip.failed == 0


def test_bytes_of_pieces_that_decode_differently_at_the_start(
    tmp_path: Path, texts: list[str]
) -> None:
    """Vocabularies with a space symbol and single bytes, as those of Llama's first generations."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=True, unk_token="<unk>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="first")
    model.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.ByteFallback(),
            tokenizers.decoders.Metaspace(prepend_scheme="first"),
        ]
    )
    single = [f"<0x{byte:02X}>" for byte in range(256)]
    model.train_from_iterator(
        texts,
        tokenizers.trainers.BpeTrainer(
            vocab_size=500, special_tokens=["<unk>", *single], show_progress=False
        ),
    )
    content = json.loads(model.to_str())
    content["added_tokens"] = [t for t in content["added_tokens"] if t["content"] == "<unk>"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
    lengths = tokenizer.token_bytes()
    assert tokenizer.prefix_bytes == 1
    for text in [*texts[:20], "a  b", "h\u00e9llo \u2603"]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert lengths[ids].sum() - tokenizer.prefix_bytes == len(text.encode())
