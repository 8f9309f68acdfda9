"""Optional formats, Parquet and Hugging Face datasets, each against plain JSON lines."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_pipeline.corpus.source import SourceSettings
from data_pipeline.errors import CorpusError
from data_pipeline.prepare.prepare import prepare
from data_pipeline.prepare.settings import PrepareSettings, TokenizerSettings
from data_pipeline.shards.manifest import Manifest


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
        pyarrow.table({"body": texts, "n": list(range(len(texts)))}), tmp_path / "b.parquet"
    )
    plain = prepared(tmp_path, tmp_path / "a.jsonl", tokenizer_file, "one")
    table = prepared(tmp_path, tmp_path / "b.parquet", tokenizer_file, "two")
    assert plain.sha256 == table.sha256
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
