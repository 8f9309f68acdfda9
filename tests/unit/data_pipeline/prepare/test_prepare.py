"""Preparation: nothing lost or doubled, splits by content, repeatable to the byte."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard

from data_pipeline.corpus.source import SourceSettings
from data_pipeline.errors import CorpusError, DataError
from data_pipeline.prepare.prepare import prepare
from data_pipeline.prepare.settings import PrepareSettings, TokenizerSettings
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.pool import TokenPool
from data_pipeline.tokenizer import load_tokenizer


def write_lines(path: Path, texts: list[str]) -> Path:
    path.write_text(
        "".join(json.dumps({"id": f"d{i}", "text": t}) + "\n" for i, t in enumerate(texts))
    )
    return path


def settings_for(
    out: Path, *sources: Path | SourceSettings, tokenizer: Path, **options: Any
) -> PrepareSettings:
    listed = tuple(
        s if isinstance(s, SourceSettings) else SourceSettings(path=str(s)) for s in sources
    )
    defaults: dict[str, Any] = {
        "validation_fraction": 0.2,
        "workers": 1,
        "member_bytes": 1024,
        "members_per_shard": 4,
    }
    return PrepareSettings(
        out=out,
        sources=listed,
        tokenizer=TokenizerSettings(path=tokenizer),
        **{**defaults, **options},
    )


def pool_texts(manifest: Path, tokenizer: Path) -> list[str]:
    """All documents of a pool, decoded from its tokens."""
    pool, model = TokenPool(manifest), load_tokenizer(tokenizer)
    tokens = pool.tokens(0, pool.num_tokens)
    ends = np.flatnonzero(tokens == model.doc_id)
    assert ends[-1] == len(tokens) - 1
    return [model.decode(part[part != model.doc_id]) for part in np.split(tokens, ends + 1)[:-1]]


def files(folder: Path) -> dict[str, bytes]:
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    }


def test_pools_hold_every_distinct_document_exactly_once(
    tmp_path: Path, texts: list[str], tokenizer_file: Path
) -> None:
    source = write_lines(tmp_path / "a.jsonl", [*texts, *texts[:30], "", "  \n"])
    result = prepare(settings_for(tmp_path / "out", source, tokenizer=tokenizer_file))
    train = pool_texts(result.train, result.tokenizer)
    validation = pool_texts(result.validation, result.tokenizer)
    assert sorted(train + validation) == sorted(set(texts))
    assert not set(train) & set(validation)
    assert 8 <= len(validation) <= 45
    dropped = result.report["sources"][0]["dropped"]
    assert dropped == {
        "exact_duplicates": 30 + len(texts) - len(set(texts)),
        "empty": 2,
        "malformed": 0,
    }
    for path, held in ((result.train, train), (result.validation, validation)):
        manifest = Manifest.load(path)
        assert manifest.raw_bytes == sum(len(t.encode()) for t in held)
        assert manifest.documents.count == manifest.round_trip.checked == len(held)
        assert manifest.round_trip.failed == 0
        lengths = load_tokenizer(result.tokenizer).token_bytes()
        pool = TokenPool(path)
        assert lengths[pool.tokens(0, pool.num_tokens)].sum() == manifest.raw_bytes


def test_output_does_not_depend_on_processes_files_or_their_order(
    tmp_path: Path, texts: list[str], tokenizer_file: Path
) -> None:
    whole = write_lines(tmp_path / "whole.jsonl", texts)
    parts = tmp_path / "parts"
    parts.mkdir()
    for i in range(4):
        write_lines(parts / f"{3 - i}.jsonl", texts[i::4])
    one = settings_for(
        tmp_path / "one", SourceSettings(path=str(whole), name="s"), tokenizer=tokenizer_file
    )
    two = settings_for(
        tmp_path / "two",
        SourceSettings(path=str(parts), name="s"),
        tokenizer=tokenizer_file,
        workers=2,
    )
    prepare(one)
    prepare(two)
    first, second = files(one.out), files(two.out)
    first.pop("report.json")
    second.pop("report.json")
    assert first == second


def test_adding_a_source_moves_no_document_across_the_split(
    tmp_path: Path, texts: list[str], tokenizer_file: Path
) -> None:
    first, second = (
        write_lines(tmp_path / "a.jsonl", texts[:60]),
        write_lines(tmp_path / "b.jsonl", texts[60:]),
    )
    small = prepare(settings_for(tmp_path / "small", first, tokenizer=tokenizer_file))
    large = prepare(
        settings_for(tmp_path / "large", first, second, tokenizer=tokenizer_file, seed=99)
    )
    for split in ("train", "validation"):
        inner, outer = (set(pool_texts(getattr(r, split), tokenizer_file)) for r in (small, large))
        assert inner < outer
    listed = Manifest.load(large.train).sources
    assert [s.name for s in listed] == ["a.jsonl", "b.jsonl"]
    assert sum(s.tokens for s in listed) == Manifest.load(large.train).tokens


def test_seed_reorders_documents_and_nothing_else(
    tmp_path: Path, texts: list[str], tokenizer_file: Path
) -> None:
    source = write_lines(tmp_path / "a.jsonl", texts)
    orders = [
        pool_texts(
            prepare(
                settings_for(tmp_path / str(seed), source, tokenizer=tokenizer_file, seed=seed)
            ).train,
            tokenizer_file,
        )
        for seed in (1, 2)
    ]
    assert orders[0] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1])


def test_a_finished_folder_is_left_alone_and_a_changed_one_refused(
    tmp_path: Path, texts: list[str], tokenizer_file: Path
) -> None:
    source = write_lines(tmp_path / "a.jsonl", texts)
    chosen = settings_for(tmp_path / "out", source, tokenizer=tokenizer_file)
    assert not prepare(chosen).already_done
    before = {p: p.stat().st_mtime_ns for p in chosen.out.rglob("*")}
    assert prepare(chosen.model_copy(update={"workers": 2})).already_done
    assert {p: p.stat().st_mtime_ns for p in chosen.out.rglob("*")} == before
    with pytest.raises(DataError, match="other settings"):
        prepare(chosen.model_copy(update={"seed": 5}))
    write_lines(source, texts[:-1])
    with pytest.raises(DataError, match="other inputs"):
        prepare(chosen)


def test_readers_agree_whatever_the_container(
    tmp_path: Path, texts: list[str], tokenizer_file: Path
) -> None:
    texts = texts[:40]
    lines = "".join(json.dumps({"body": t}) + "\n" for t in texts).encode()
    (tmp_path / "a.jsonl").write_bytes(lines)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "c.jsonl.zst").write_bytes(
        b"".join(zstandard.compress(lines[i : i + 5000]) for i in range(0, len(lines), 5000))
    )
    folder = tmp_path / "texts"
    folder.mkdir()
    for i, text in enumerate(texts):
        (folder / f"{i:03d}.txt").write_text(text, newline="")
    seen = []
    for path in (tmp_path / "a.jsonl", tmp_path / "b.jsonl.gz", tmp_path / "c.jsonl.zst", folder):
        source = SourceSettings(path=str(path), name="s", text_field="body")
        seen.append(
            prepare(
                settings_for(tmp_path / f"out-{path.name}", source, tokenizer=tokenizer_file)
            ).train
        )
    assert len({Manifest.load(path).sha256 for path in seen}) == 1


def test_long_text_is_split_at_blank_lines_without_loss(
    tmp_path: Path, tokenizer_file: Path
) -> None:
    text = "\n\n".join(f"paragraph {i} " + "word " * (i % 17) for i in range(300))
    (tmp_path / "book.txt").write_text(text)
    source = SourceSettings(path=str(tmp_path / "book.txt"), chunk_characters=200)
    result = prepare(settings_for(tmp_path / "out", source, tokenizer=tokenizer_file))
    held = pool_texts(result.train, tokenizer_file) + pool_texts(result.validation, tokenizer_file)
    assert sum(map(len, held)) == len(text)
    assert all(chunk in text for chunk in held)


def test_bad_lines_stop_the_run_and_are_named(
    tmp_path: Path, texts: list[str], tokenizer_file: Path
) -> None:
    path = write_lines(tmp_path / "a.jsonl", texts)
    with open(path, "a") as file:
        file.write('{"text": 5}\nnot json\n{"text": "\\ud800"}\n')
    chosen = settings_for(tmp_path / "out", path, tokenizer=tokenizer_file)
    with pytest.raises(CorpusError, match=r"a\.jsonl:121: no text in field 'text'"):
        prepare(chosen)
    with pytest.raises(CorpusError, match="found 3, 2 are allowed"):
        prepare(settings_for(tmp_path / "two", path, tokenizer=tokenizer_file, skip_bad=2))
    result = prepare(settings_for(tmp_path / "three", path, tokenizer=tokenizer_file, skip_bad=3))
    source = result.report["sources"][0]
    assert source["dropped"]["malformed"] == 3
    assert [line.split(": ")[0].rsplit(":")[-1] for line in source["malformed_examples"]] == [
        "121",
        "122",
        "123",
    ]
    assert sorted(
        pool_texts(result.train, tokenizer_file) + pool_texts(result.validation, tokenizer_file)
    ) == sorted(set(texts))


def test_unusable_sources_are_refused(tmp_path: Path, tokenizer_file: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    (tmp_path / "blank.txt").write_text(" \n")
    (tmp_path / "one.txt").write_text("a single document")
    (tmp_path / "x.pdf").write_bytes(b"")
    (tmp_path / "truncated.jsonl.gz").write_bytes(gzip.compress(b'{"text": "hello"}\n' * 100)[:-9])
    (tmp_path / "truncated.jsonl.zst").write_bytes(
        zstandard.compress(b'{"text": "hello"}\n' * 100)[:-9]
    )
    damaged = bytearray(gzip.compress(b"".join(b'{"text": "%d"}\n' % i for i in range(999))))
    damaged[500] ^= 0xFF
    (tmp_path / "damaged.jsonl.gz").write_bytes(damaged)
    for name, reason in (
        ("missing.txt", "no such file"),
        ("empty", "no file that can be read"),
        ("x.pdf", "unknown ending"),
        ("blank.txt", "hold no text"),
        ("one.txt", "pool would be empty"),
        ("truncated.jsonl.gz", "cannot read"),
        ("truncated.jsonl.zst", "truncated"),
        ("damaged.jsonl.gz", "cannot read|not JSON"),
    ):
        chosen = settings_for(tmp_path / f"out-{name}", tmp_path / name, tokenizer=tokenizer_file)
        with pytest.raises(CorpusError, match=reason):
            prepare(chosen)
