"""Folders: no text is missing without a word."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from reading import read_source, texts

from data_pipeline.corpus.listing import list_sources
from data_pipeline.corpus.source import SourceSettings
from data_pipeline.errors import CorpusError


def test_links_are_followed_and_loops_end(tmp_path: Path) -> None:
    """Each folder is read once, real folders before linked ones, whatever leads to it."""
    elsewhere, books = tmp_path / "elsewhere", tmp_path / "books"
    (books / "b").mkdir(parents=True)
    (elsewhere / "deep").mkdir(parents=True)
    (books / "b" / "one.txt").write_text("one")
    (elsewhere / "two.txt").write_text("two")
    (elsewhere / "deep" / "three.txt").write_text("three")
    (books / "a").symlink_to(elsewhere)
    (books / "again").symlink_to(books / "b")
    (books / "b" / "loop").symlink_to(books)
    (elsewhere / "deep" / "back").symlink_to(elsewhere)
    (books / "file.txt").symlink_to(elsewhere / "two.txt")
    documents, bad = read_source(books)
    assert not bad
    found = [(d.id, d.text) for d in documents]
    assert found == [
        ("file.txt", "two"),
        ("b/one.txt", "one"),
        ("a/two.txt", "two"),
        ("a/deep/three.txt", "three"),
    ]


def test_a_link_that_leads_nowhere_is_a_bad_record(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "folder").symlink_to(tmp_path / "nowhere")
    (tmp_path / "gone.txt").symlink_to(tmp_path / "none.txt")
    (tmp_path / "circle.jsonl").symlink_to(tmp_path / "circle.jsonl")
    documents, bad = read_source(tmp_path)
    assert [d.text for d in documents] == ["text"]
    assert [(Path(b.place).name, b.reason) for b in bad] == [
        ("circle.jsonl", "the link leads nowhere"),
        ("folder", "the link leads nowhere"),
        ("gone.txt", "the link leads nowhere"),
    ]


def test_a_folder_that_cannot_be_listed_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "closed").mkdir()
    (tmp_path / "a.txt").write_text("text")
    scandir = os.scandir

    def scan(path: Any) -> Any:
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", scan)
    with pytest.raises(CorpusError, match=r"cannot list the folder .*closed: Permission denied"):
        read_source(tmp_path)


def test_ignored_files_are_counted_by_ending(tmp_path: Path) -> None:
    for name in ("a.txt", "b.PDF", "c.pdf", "README", ".hidden.txt", "d.tar.gz", "e.docx"):
        (tmp_path / name).write_bytes(b"text")
    listing = list_sources((SourceSettings(path=str(tmp_path)),))
    assert [unit.label for unit in listing.units] == ["a.txt"]
    assert listing.ignored == [
        {".docx": 1, ".pdf": 2, ".tar.gz": 1, "hidden": 1, "without ending": 1}
    ]
    (tmp_path / "a.txt").unlink()
    with pytest.raises(CorpusError, match=r"no file that can be read \(1 \.docx, 2 \.pdf"):
        read_source(tmp_path)


def test_names_that_are_not_utf8_are_escaped_in_ids(tmp_path: Path) -> None:
    name = os.fsencode(tmp_path) + b"/caf\xe9.txt"
    Path(os.fsdecode(name)).write_text("text")
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xe9t\xe9"))
    folder.mkdir()
    (folder / "b.jsonl").write_text('{"text": "more"}\nno JSON\n')
    documents, bad = read_source(tmp_path)
    assert [d.id for d in documents] == ["caf\\udce9.txt", "\\udce9t\\udce9/b.jsonl:1"]
    assert len(bad) == 1


def test_all_text_endings_are_read(tmp_path: Path) -> None:
    for name in ("a.txt", "b.text", "c.md", "d.TXT"):
        (tmp_path / name).write_text(name)
    assert texts(tmp_path) == ["a.txt", "b.text", "c.md", "d.TXT"]
