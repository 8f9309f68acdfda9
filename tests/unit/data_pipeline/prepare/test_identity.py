"""Pools of earlier versions are recognised: new settings leave the hash of the others alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_pipeline.corpus.source import SourceSettings
from data_pipeline.errors import DataError
from data_pipeline.prepare.prepare import prepare
from data_pipeline.prepare.settings import PrepareSettings, TokenizerSettings

OUT = Path("o")


def test_settings_of_earlier_versions_keep_their_hashes() -> None:
    """Hashes that version 0.1.0 gave."""
    default = PrepareSettings(out=OUT)
    books = SourceSettings(path="b.txt", chunk_characters=9, text_field="x")
    given = PrepareSettings(
        out=OUT,
        sources=(books,),
        tokenizer=TokenizerSettings(vocab_size=500, model_type="bpe"),
    )
    existing = PrepareSettings(out=OUT, tokenizer=TokenizerSettings(path=Path("t.model")))
    assert default.earlier_sha256().startswith("8c6811e8c21f828c")
    assert given.sha256().startswith("0b275879a5fbc484")
    assert existing.sha256().startswith("5000119fa55ab9d1")
    split = SourceSettings(path="b.txt", split="lines", text_field="x")
    assert given.model_copy(update={"sources": (split,)}).sha256() != given.sha256()
    assert default.sha256() != default.earlier_sha256()


def test_a_pool_with_the_earlier_default_vocabulary_is_left_alone(tmp_path: Path) -> None:
    """Without a size, 32,000 ids of an earlier version are as good; another size is refused."""
    (tmp_path / "a.txt").write_text("text")
    source = SourceSettings(path=str(tmp_path / "a.txt"), split="lines")
    out = tmp_path / "out"
    chosen = PrepareSettings(out=out, sources=(source,))
    named = chosen.model_copy(update={"tokenizer": TokenizerSettings(vocab_size=32000)})
    from data_pipeline.corpus.listing import list_sources
    from data_pipeline.prepare.identity import inputs_sha256

    inputs = inputs_sha256(list_sources(chosen.sources).units, chosen)
    report = {
        "settings_sha256": named.sha256(),
        "inputs_sha256": inputs,
        "settings": named.content(),
        "tokenizer": {"file": "tokenizer.model"},
    }
    out.mkdir()
    (out / "report.json").write_text(json.dumps(report))
    assert prepare(chosen).already_done
    assert prepare(named).already_done
    other = chosen.model_copy(update={"tokenizer": TokenizerSettings(vocab_size=8000)})
    with pytest.raises(DataError, match="vocab_size: 32000 there, 8000 given"):
        prepare(other)
    report["settings_sha256"] = chosen.sha256()
    (out / "report.json").write_text(json.dumps(report))
    with pytest.raises(DataError, match="other settings"):
        prepare(named)
