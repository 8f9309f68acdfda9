"""A split that leaves a pool empty is refused before anything is trained."""

from __future__ import annotations

from pathlib import Path

import pytest

import data_pipeline.prepare.prepare as preparation
from data_pipeline.corpus.source import SourceSettings
from data_pipeline.errors import CorpusError
from data_pipeline.prepare.prepare import prepare
from data_pipeline.prepare.settings import PrepareSettings, TokenizerSettings
from data_pipeline.shards.manifest import Manifest

WORDS = "bank said it would not change its rate in the third quarter of this year".split()  # noqa: SIM905


def penn_treebank(path: Path) -> Path:
    """One sentence a line and no blank line."""
    lines = (f" {' '.join(WORDS[i % 9 :])} <unk> N {i} \n" for i in range(300))
    path.write_text("".join(lines))
    return path


def wikitext(path: Path) -> Path:
    """Headings and one paragraph a line, between lines with a space."""
    sections = (f" = Title {i} = \n \n {' '.join(WORDS[i % 7 :])} {i} . \n \n" for i in range(150))
    path.write_text(" \n" + "".join(sections))
    return path


def settings(out: Path, path: Path, split: str | None, fraction: float = 0.02) -> PrepareSettings:
    return PrepareSettings(
        out=out,
        sources=(SourceSettings.model_validate({"path": str(path), "split": split}),),
        tokenizer=TokenizerSettings(model_type="bpe"),
        validation_fraction=fraction,
        workers=1,
    )


def test_an_empty_pool_is_refused_before_training_with_the_split_that_helps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparation, "make_tokenizer", None)
    path = penn_treebank(tmp_path / "ptb.txt")
    with pytest.raises(CorpusError, match="validation pool would be empty") as told:
        prepare(settings(tmp_path / "out", path, None))
    assert "1 different document(s)" in str(told.value)
    assert "--split paragraphs" in str(told.value)
    assert "raise validation_fraction" not in str(told.value)  # it cannot help one document
    with pytest.raises(CorpusError, match=r"each line \(--split lines\)") as told:
        prepare(settings(tmp_path / "out", path, "paragraphs"))
    assert "--split paragraphs" not in str(told.value)
    with pytest.raises(CorpusError, match=r"train pool would.*lower validation_fraction"):
        prepare(settings(tmp_path / "out", wikitext(tmp_path / "w.txt"), "lines", 0.999999999999))


@pytest.mark.parametrize(("make", "split"), [(penn_treebank, "lines"), (wikitext, "paragraphs")])
def test_text_without_documents_is_prepared_by_lines_or_paragraphs(
    tmp_path: Path, make: object, split: str
) -> None:
    assert callable(make)
    path = make(tmp_path / "text.txt")
    result = prepare(settings(tmp_path / "out", path, split))
    pools = [Manifest.load(p) for p in (result.train, result.validation)]
    assert all(pool.documents.count for pool in pools)
    assert sum(pool.documents.count for pool in pools) == 300
    if split == "lines":
        assert sum(pool.raw_bytes for pool in pools) == path.stat().st_size
