"""Readers: every container gives the same documents, every bad record is named with its place."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard
from reading import read_source, texts

from data_pipeline.errors import CorpusError

BOM = b"\xef\xbb\xbf"
RECORDS = [{"id": 1, "text": 'one, "quoted"\nline'}, {"id": 2, "text": "zwei\tä"}]
LINES = "".join(json.dumps(r) + "\n" for r in RECORDS).encode()
CSV = 'id,text\r\n1,"one, ""quoted""\nline"\r\n2,zwei\tä\r\n'.encode()
TSV = 'id\ttext\n1\t"one, ""quoted""\nline"\n2\t"zwei\tä"\n'.encode()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", LINES),
        ("a.jsonl", BOM + LINES),
        ("a.json", json.dumps(RECORDS, indent=1).encode()),
        ("a.json", BOM + json.dumps(RECORDS).encode()),
        ("a.json", LINES),
        ("a.csv", CSV),
        ("a.csv", BOM + CSV),
        ("a.tsv", TSV),
        ("a.jsonl.gz", gzip.compress(LINES, mtime=0)),
        ("a.jsonl.bz2", bz2.compress(LINES[:20]) + bz2.compress(LINES[20:])),
        ("a.jsonl.xz", lzma.compress(LINES)),
        ("a.JSONL.XZ", lzma.compress(LINES)),
        ("a.csv.zst", zstandard.compress(CSV)),
        ("a.tsv.bz2", bz2.compress(TSV)),
    ],
)
def test_every_container_gives_the_same_documents(
    tmp_path: Path, name: str, content: bytes
) -> None:
    (tmp_path / name).write_bytes(content)
    documents, bad = read_source(tmp_path)
    assert not bad
    assert [(d.id, d.text) for d in documents] == [(str(r["id"]), r["text"]) for r in RECORDS]


@pytest.mark.parametrize(
    ("ending", "compress"),
    [
        (".gz", gzip.compress),
        (".bz2", bz2.compress),
        (".xz", lzma.compress),
        (".zst", zstandard.compress),
    ],
)
@pytest.mark.parametrize("keep", [0, 30])
def test_truncated_and_empty_archives_are_errors(
    tmp_path: Path, ending: str, compress: Callable[[bytes], bytes], keep: int
) -> None:
    for inner in (".txt", ".jsonl", ".json", ".csv"):
        path = tmp_path / f"a{inner}{ending}"
        path.write_bytes(compress(LINES * 50)[:keep])
        with pytest.raises(CorpusError, match=f"cannot read .*{path.name}"):
            read_source(path)


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(BOM + b"first\n\nsecond")
    assert texts(path) == ["first\n\nsecond"]
    assert texts(path, chunk_characters=1) == ["first\n\n", "second"]


def test_texts_are_split_into_paragraphs_or_lines_without_loss(tmp_path: Path) -> None:
    text = " = Title = \n \n First line . \n Second . \n \n\n  Third , indented . \nlast"
    path = tmp_path / "a.txt"
    path.write_bytes(text.encode())
    assert texts(path) == texts(path, split="files") == [text]
    paragraphs = texts(path, split="paragraphs")
    assert paragraphs == [
        " = Title = \n \n ",
        "First line . \n Second . \n \n\n  ",
        "Third , indented . \nlast",
    ]
    assert paragraphs == texts(path, chunk_characters=1)
    lines = texts(path, split="lines")
    assert lines == [
        " = Title = \n \n",
        " First line . \n",
        " Second . \n \n\n",
        "  Third , indented . \n",
        "last",
    ]
    assert texts(path, split="lines", chunk_characters=20) == [
        lines[0] + lines[1],
        lines[2] + lines[3],
        "last",
    ]
    with pytest.raises(ValueError, match="split is files, so chunk_characters must be 0"):
        texts(path, split="files", chunk_characters=5)


def test_fields_may_be_nested_and_joined(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    record = {
        "meta": {"id": "m7"},
        "title": "T",
        "data": {"text": "deep"},
        "a.b": "dotted",
        "c,d": "comma",
        "none": None,
        "empty": "",
    }
    path.write_text(json.dumps(record))
    for field, expected in (
        ("data.text", "deep"),
        ("title,data.text", "T\n\ndeep"),
        ("title, data.text,empty", "T\n\ndeep"),
        ("a.b", "dotted"),
        ("c,d", "comma"),
    ):
        documents, _ = read_source(path, text_field=field, id_field="meta.id")
        assert [(d.id, d.text) for d in documents] == [("m7", expected)]
    for field, missing in (("title,none", "none"), ("data.body", "data.body"), ("title.x", "x")):
        _, bad = read_source(path, text_field=field)
        assert missing in bad[0].reason
        assert bad[0].place == f"{path}:1"


@pytest.mark.parametrize(
    ("name", "content", "line", "reason"),
    [
        ("a.jsonl", b"[" * 200_000, ":1", "nested too deeply"),
        ("a.json", b'{"text": ' + b"[" * 200_000, "", "nested too deeply"),
        ("a.json", b"", "", "not JSON"),
        ("a.json", b'{"text": "a", "text": "b"}', "", "'text' stands twice"),
        ("a.json", b'[{"text": "a"}, 5]', " item 2", "not a JSON object"),
        ("a.json", b'[{"text": "a"}, {"body": 5}]', " item 2", "no text in field 'text'"),
        ("a.jsonl", b'{"text": "a", "text": "b"}', ":1", "'text' stands twice"),
        ("a.jsonl", b'{"text": "\xe9"}', ":1", "not JSON"),
        ("a.csv", b"n,text\n1,a\n2,b,c\n", ":3", "3 fields and the header has 2"),
        ("a.csv", b"n,text\n1\n", ":2", "1 fields and the header has 2"),
        ("a.csv", b'n,text\n1,"open\n', ":2", "not a row"),
        ("a.csv", b'n,text\n1,"a"b\n2,c\n', ":2", "not a row"),
        ("a.csv", b"n,text\n1,caf\xe9\n2,b\n", ":2", "not UTF-8"),
        ("a.txt", b"caf\xe9", "", "not UTF-8 at byte 3"),
    ],
)
def test_a_bad_record_is_named_with_its_place(
    tmp_path: Path, name: str, content: bytes, line: str, reason: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    _, bad = read_source(path)
    assert [b.place for b in bad] == [f"{path}{line}"]
    assert reason in bad[0].reason


def test_an_id_with_half_a_surrogate_pair_is_escaped(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"id": "x\\ud83d", "text": "kept"}\n{"id": {"a": 1}, "text": "too"}\n')
    documents, bad = read_source(path)
    assert not bad
    assert [(d.id, d.text) for d in documents] == [("x\\ud83d", "kept"), ("a.jsonl:2", "too")]


def test_tables_whose_columns_are_unclear_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    for content, reason in (
        ("text,n,text\na,1,b\n", r"columns 1 and 3 are both called 'text'"),
        ("body\na\n", r"no column 'text'; columns: body"),
        ("", "no header line"),
    ):
        path.write_text(content)
        with pytest.raises(CorpusError, match=reason):
            read_source(path)


def test_parquet_names_bad_rows_and_doubled_columns(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    raw = [b"good", b"caf\xe9", b"more"]
    binary = pyarrow.array(raw, pyarrow.binary())
    text = pyarrow.StringArray.from_buffers(3, *binary.buffers()[1:])
    ids = pyarrow.array(["a", "b", "c"])
    parquet.write_table(pyarrow.table({"text": text, "id": ids}), path)
    documents, bad = read_source(path)
    assert [(d.id, d.text) for d in documents] == [("a", "good"), ("c", "more")]
    assert [b.place for b in bad] == [f"{path} row 2"]
    assert "utf-8" in bad[0].reason
    parquet.write_table(pyarrow.table({"text": ids, "id": text}), path)
    documents, bad = read_source(path)
    assert not bad
    assert [(d.id, d.text) for d in documents] == [
        ("good", "a"),
        ("a.parquet:2", "b"),
        ("more", "c"),
    ]
    parquet.write_table(pyarrow.Table.from_arrays([ids, ids], names=["text", "text"]), path)
    with pytest.raises(CorpusError, match="columns 1 and 2 are both called 'text'"):
        read_source(path)
    nested = pyarrow.array([{"text": "deep", "n": 1}, {"text": None, "n": 2}])
    parquet.write_table(pyarrow.table({"data": nested, "title": ["T", "U"]}), path)
    documents, bad = read_source(path, text_field="title,data.text")
    assert [d.text for d in documents] == ["T\n\ndeep"]
    assert "no text in field 'data.text'" in bad[0].reason
