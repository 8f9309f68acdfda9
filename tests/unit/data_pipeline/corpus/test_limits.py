"""Files that would fill the memory or never end are refused with their place."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.corpus import compression, text
from data_pipeline.corpus.document import BadRecord, Document
from data_pipeline.corpus.listing import list_sources
from data_pipeline.corpus.source import SourceSettings
from data_pipeline.corpus.units import read_unit
from data_pipeline.errors import CorpusError
from data_pipeline.prepare.prepare import prepare
from data_pipeline.prepare.settings import PrepareSettings, TokenizerSettings

MEGABYTE = 1 << 20


def read(path: Path, **changes: Any) -> list[Document | BadRecord]:
    source = SourceSettings(path=str(path), **changes)
    return [item for unit in list_sources((source,)).units for item in read_unit(unit, source)]


def test_a_long_line_is_a_bad_record_and_the_next_one_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    lines = [json.dumps({"text": "x" * size}) for size in (10, 5000, 20)]
    path.write_text("\n".join(lines))
    first, bad, last = read(path, max_document_bytes=1000)
    assert isinstance(first, Document) and isinstance(last, Document)
    assert (len(first.text), len(last.text)) == (10, 20)
    assert isinstance(bad, BadRecord)
    assert bad.place == f"{path}:2"
    assert "a line of more than 1,000 bytes" in bad.reason
    assert "raise max_document_bytes" in bad.reason
    exact = len(lines[1])
    assert all(isinstance(item, Document) for item in read(path, max_document_bytes=exact))


def peak_of(action: Any) -> int:
    """Bytes by which a child's peak of resident memory exceeds that of one that does nothing."""
    peaks = []
    for run in (lambda: None, action):
        pid = os.fork()
        if not pid:
            try:
                run()
                os._exit(0)
            finally:
                os._exit(1)
        _, status, used = os.wait4(pid, 0)
        assert status == 0
        peaks.append(used.ru_maxrss * 1024)
    return peaks[1] - peaks[0]


@pytest.mark.parametrize(
    ("name", "chunk"),
    [("a.jsonl", 0), ("a.jsonl.gz", 0), ("a.txt", 0), ("a.txt", 100), ("a.csv", 0)],
)
def test_a_line_of_200_mb_takes_little_memory(tmp_path: Path, name: str, chunk: int) -> None:
    path = tmp_path / name
    path.touch()
    if name.endswith(".gz"):
        with gzip.open(path, "wb", compresslevel=1) as file:
            for _ in range(200):
                file.write(b"x" * MEGABYTE)
    else:
        os.truncate(path, 200 * MEGABYTE)
    options = {"max_document_bytes": MEGABYTE, "chunk_characters": chunk}

    def refused() -> None:
        assert len(catch(path, options)) == 1

    assert peak_of(refused) < 40 * MEGABYTE


def catch(path: Path, options: dict[str, Any]) -> list[Any]:
    """Bad records of a file, or its error."""
    try:
        return [item for item in read(path, **options) if isinstance(item, BadRecord)]
    except CorpusError as error:
        return [error]


@pytest.mark.parametrize("ending", ["gz", "zst", "bz2", "xz"])
def test_a_decompression_bomb_is_refused(
    tmp_path: Path, ending: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compression, "_UNCHECKED", 4 * MEGABYTE)
    path = tmp_path / f"a.txt.{ending}"
    zstandard = pytest.importorskip("zstandard")
    writers: dict[str, tuple[Any, dict[str, int]]] = {
        "gz": (gzip.open, {"compresslevel": 1}),
        "zst": (zstandard.open, {}),
        "bz2": (bz2.open, {}),
        "xz": (lzma.open, {"preset": 0}),
    }
    write, options = writers[ending]
    with write(path, "wb", **options) as file:
        for _ in range(40 if ending in ("bz2", "xz") else 200):
            file.write(bytes(MEGABYTE))
    with pytest.raises(CorpusError, match=rf"{path}: it expands to more than 200 times"):
        read(path, max_document_bytes=1 << 30)
    assert peak_of(lambda: catch(path, {"chunk_characters": 10})) < 150 * MEGABYTE


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.txt.gz", "a.parquet"])
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_pipes_and_devices_are_not_read(tmp_path: Path, name: str, kind: str) -> None:
    pytest.importorskip("pyarrow")
    if kind == "pipe":
        os.mkfifo(tmp_path / name)
    else:
        (tmp_path / name).symlink_to("/dev/zero")
    with pytest.raises(CorpusError, match="not a regular file"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("[" * 200_000, "nested too deeply"),
        ('{"a":' * 200_000, "nested too deeply"),
        ('{"text": [' + "[]," * 3_000_000 + "[]]}", "mostly brackets"),
    ],
    ids=["deep list", "deep object", "wide"],
)
def test_json_that_would_fill_the_memory_is_a_bad_record(
    tmp_path: Path, line: str, reason: str
) -> None:
    (tmp_path / "a.jsonl").write_text(line + '\n{"text": "kept"}\n')
    bad, kept = read(tmp_path)
    assert isinstance(bad, BadRecord) and reason in bad.reason
    assert kept == Document("a.jsonl:2", "kept")


def test_large_documents_count_as_malformed_and_can_be_skipped(
    tmp_path: Path, texts: list[str], tokenizer_file: Path
) -> None:
    lines = [json.dumps({"text": t}) for t in (*texts, "x" * 50_000)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    options: dict[str, Any] = {
        "sources": [{"path": str(tmp_path / "a.jsonl"), "max_document_bytes": 40_000}],
        "tokenizer": TokenizerSettings(path=tokenizer_file),
        "validation_fraction": 0.2,
        "workers": 1,
    }
    with pytest.raises(CorpusError, match=rf"a\.jsonl:{len(lines)}: a line of more than 40,000"):
        prepare(PrepareSettings(out=tmp_path / "one", **options))
    report = prepare(PrepareSettings(out=tmp_path / "two", skip_bad=1, **options)).report
    assert report["sources"][0]["dropped"]["malformed"] == 1


def test_the_default_limit_does_not_change_what_was_prepared_before() -> None:
    """The vocabulary was 32,000 where none was given."""
    vocabulary = TokenizerSettings(vocab_size=32000)
    before = PrepareSettings(out=Path("x"), tokenizer=vocabulary)
    assert before.sha256() == "8c6811e8c21f828cd661802a03f1fbf228521128d6ad5a5761507e51f938be9e"
    limited = SourceSettings(path="builtin", license="PSF-2.0", max_document_bytes=1000)
    assert before.model_copy(update={"sources": (limited,)}).sha256() != before.sha256()


def chunks_of_a_whole_text(whole: str, characters: int) -> list[str]:
    """The definition: chunks of at least so many characters that end after blank lines."""
    found, start = [], 0
    for match in re.finditer(r"\n[ \t\r]*\n\s*", whole):
        if match.end() - start >= characters and match.end() < len(whole):
            found.append(whole[start : match.end()])
            start = match.end()
    return [*found, whole[start:]] if start < len(whole) else found


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="aé\n \t\r", max_size=60), st.integers(1, 9), st.integers(1, 7))
def test_chunks_of_a_stream_are_those_of_the_whole_text(
    whole: str, characters: int, block: int
) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "_BLOCK", block)
        path = Path(folder) / "a.txt"
        path.write_bytes(whole.encode())
        found = [item.text for item in read(path, chunk_characters=characters)]
    assert found == chunks_of_a_whole_text(whole, characters)
