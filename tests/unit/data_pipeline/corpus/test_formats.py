"""Optional formats: Parquet, Hugging Face datasets and tokenizer.json, each against plain JSONL."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.corpus.builtin import builtin_documents
from data_pipeline.errors import CorpusError, TokenizerError
from data_pipeline.prepare.prepare import prepare
from data_pipeline.prepare.settings import PrepareSettings, SourceSettings, TokenizerSettings
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.pool import TokenPool
from data_pipeline.tokenizer import Tokenizer, load_tokenizer

tokenizers = pytest.importorskip("tokenizers", reason="needs the data extra")


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return [t[:800] for _, (_, t) in zip(range(60), builtin_documents(), strict=False)]


@pytest.fixture(scope="module")
def tokenizer_file(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
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
def tokenizer(tokenizer_file: Path) -> Tokenizer:
    return load_tokenizer(tokenizer_file)


@given(text=st.text(max_size=60))
@settings(max_examples=150, deadline=None)
def test_huggingface_round_trip_of_any_text(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not set(ids) & {*tokenizer.never_targets, tokenizer.doc_id}
    assert tokenizer.token_bytes()[ids].sum() == len(text.encode())


def test_huggingface_specials_cannot_be_typed(tokenizer: Tokenizer) -> None:
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


def prepared(tmp_path: Path, path: Path, tokenizer_file: Path, name: str) -> Manifest:
    source = SourceSettings(path=str(path), name="s", text_field="body")
    chosen = PrepareSettings(
        out=tmp_path / name,
        sources=(source,),
        tokenizer=TokenizerSettings(path=tokenizer_file),
        validation_fraction=0.2,
        workers=1,
    )
    return Manifest.load(prepare(chosen).train)


def test_parquet_gives_the_same_pool_as_json_lines(
    tmp_path: Path, texts: list[str], tokenizer_file: Path
) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"body": t}) + "\n" for t in texts))
    parquet.write_table(
        pyarrow.table({"body": texts, "n": list(range(60))}), tmp_path / "b.parquet"
    )
    plain = prepared(tmp_path, tmp_path / "a.jsonl", tokenizer_file, "one")
    table = prepared(tmp_path, tmp_path / "b.parquet", tokenizer_file, "two")
    assert plain.sha256 == table.sha256
    assert plain.tokenizer.kind == "huggingface"
    parquet.write_table(pyarrow.table({"other": texts}), tmp_path / "c.parquet")
    with pytest.raises(CorpusError, match="no column 'body'; columns: other"):
        prepared(tmp_path, tmp_path / "c.parquet", tokenizer_file, "three")
    (tmp_path / "d.parquet").write_bytes((tmp_path / "b.parquet").read_bytes()[:-50])
    with pytest.raises(CorpusError, match="cannot read"):
        prepared(tmp_path, tmp_path / "d.parquet", tokenizer_file, "four")


def test_dataset_by_name_gives_the_same_pool(
    tmp_path: Path, texts: list[str], tokenizer_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder is a dataset to the library; it is read through the same call as a hub name."""
    pytest.importorskip("datasets", reason="needs the data extra")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = tmp_path / "set"
    folder.mkdir()
    lines = "".join(json.dumps({"body": t}) + "\n" for t in texts)
    (folder / "train.jsonl").write_text(lines)
    plain = prepared(tmp_path, folder / "train.jsonl", tokenizer_file, "one")
    source = Path(f"hf:{folder}")
    assert prepared(tmp_path, source, tokenizer_file, "two").sha256 == plain.sha256


def test_near_duplicates_are_dropped_and_validation_stays_uncontaminated(
    tmp_path: Path, texts: list[str], tokenizer_file: Path
) -> None:
    pytest.importorskip("datasketch", reason="needs the data extra")
    edited = [
        text.replace(" the ", "  The ", 1) + "\nThe end." for text in texts if len(text) > 600
    ]
    path = tmp_path / "a.jsonl"
    both = [json.dumps({"id": t[:40], "body": t}) + "\n" for t in [*texts, *edited]]
    path.write_text("".join(both))
    source = SourceSettings(path=str(path), name="s", text_field="body")
    options = {"sources": (source,), "tokenizer": TokenizerSettings(path=tokenizer_file)}
    common = {**options, "validation_fraction": 0.3, "workers": 1}
    kept = prepare(PrepareSettings(out=tmp_path / "kept", **common))  # type: ignore[arg-type]
    less = prepare(PrepareSettings(out=tmp_path / "less", near_duplicates=0.8, **common))  # type: ignore[arg-type]
    report = less.report["near_duplicates"]
    assert report["copies"] + report["train_like_validation"] >= 0.9 * len(edited)
    assert report["train_like_validation"] > 0
    documents = {
        split: Manifest.load(getattr(less, split)).documents.count
        for split in ("train", "validation")
    }
    before = Manifest.load(kept.train).documents.count
    before += Manifest.load(kept.validation).documents.count
    assert sum(documents.values()) == before - report["copies"] - report["train_like_validation"]
    words = [set(text.split()) for text in pool_texts(less.train, tokenizer_file)]
    for text in pool_texts(less.validation, tokenizer_file):
        held = set(text.split())
        assert all(len(held & w) < 0.9 * len(held | w) for w in words if len(held) > 60)


def pool_texts(manifest: Path, tokenizer: Path) -> list[str]:
    pool, model = TokenPool(manifest), load_tokenizer(tokenizer)
    tokens = pool.tokens(0, pool.num_tokens)
    ends = np.flatnonzero(tokens == model.doc_id)
    return [model.decode(part.tolist()) for part in np.split(tokens, ends + 1)[:-1]]
