"""`epochal data`: what it prints for machines, and how it ends when something is wrong."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import Any

import pytest

import pretrain.cli.main as cli
from data_pipeline.corpus.builtin import builtin_documents
from pretrain.config.compose import compose, save_config

Run = Callable[..., tuple[int, Any, str]]
OPTIONS = ("--vocab-size", 500, "--model-type", "bpe", "--validation-fraction", 0.2, "--workers", 1)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    texts = [t[:700] for _, (_, t) in zip(range(50), builtin_documents(), strict=False)]
    path = tmp_path_factory.mktemp("cli") / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Call the command line: exit code, standard output (parsed under --json), standard error."""

    def call(*words: object) -> tuple[int, Any, str]:
        monkeypatch.setattr(sys, "argv", ["epochal", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capsys.readouterr()
        machine = "--json" in words and captured.out.strip()
        output = json.loads(captured.out) if machine else captured.out
        return int(ended.value.code or 0), output, captured.err

    return call


@pytest.fixture
def pool(run: Run, source: Path, tmp_path: Path) -> Path:
    code, _, _ = run("data", "prepare", source, "--out", tmp_path / "pool", *OPTIONS)
    assert code == 0
    return tmp_path / "pool"


def test_prepare_reports_and_does_nothing_twice(run: Run, source: Path, tmp_path: Path) -> None:
    command = ("data", "prepare", source, "--out", tmp_path / "pool", *OPTIONS, "--json")
    code, first, _ = run(*command)
    assert code == 0
    assert not first["already_done"]
    assert first["report"]["sources"][0]["documents_read"] == 50
    code, second, _ = run(*command)
    assert code == 0
    assert second["already_done"]
    assert second["report"] == first["report"]


def test_a_settings_file_gives_the_bytes_that_the_options_give(
    run: Run, source: Path, pool: Path, tmp_path: Path
) -> None:
    """Sources may be words; the folder of the command line wins over that of the file."""
    file = tmp_path / "prepare.yaml"
    file.write_text(
        f"out: {tmp_path / 'unused'}\n"
        f"sources: ['{source}']\n"
        "tokenizer: {vocab_size: 500, model_type: bpe}\n"
        "validation_fraction: 0.2\n"
    )
    code, made, _ = run("data", "prepare", "--settings", file, "--out", tmp_path / "p", "--json")
    assert code == 0
    assert not (tmp_path / "unused").exists()
    pools = json.loads((pool / "report.json").read_text())["pools"]
    assert made["report"]["pools"] == pools


def test_options_of_prepare_default_to_its_settings() -> None:
    from data_pipeline.corpus.source import SourceSettings
    from data_pipeline.prepare.settings import PrepareSettings, TokenizerSettings
    from pretrain.cli.prepare import prepare

    options = {name: p.default for name, p in signature(prepare).parameters.items()}
    settings = PrepareSettings(out=Path())
    groups = (settings, TokenizerSettings(), SourceSettings(path="builtin"))
    known = {name: value for group in groups for name, value in group}
    shared = (options.keys() & known.keys()) - {"out", "sources", "tokenizer"}
    assert len(shared) == 13
    assert {name: options[name] for name in shared} == {name: known[name] for name in shared}


def test_pools_are_prepared_where_training_looks_for_them() -> None:
    from pretrain.config.prepare_file import default_out

    data = [f"data={name}" for name in ("builtin", "pool")]
    builtin, pool = (compose([choice]).data.train.parent.parent for choice in data)
    assert default_out(None).absolute() == builtin
    assert default_out(["builtin"]).absolute() == builtin
    assert default_out(["books", "builtin"]).absolute() == pool


def test_verify_inspect_and_stats_agree_with_the_manifest(run: Run, pool: Path) -> None:
    assert run("data", "verify", pool, "--json")[:2][0] == 0
    manifest = pool / "train" / "manifest.json"
    code, shown, _ = run("data", "inspect", manifest, "--seq-length", 64, "--sequence", 2, "--json")
    assert code == 0
    assert shown["shown"][0]["pool_tokens"] == [128, 192]
    code, counted, _ = run("data", "stats", manifest, "--json")
    assert code == 0
    assert counted["tokens"] == shown["tokens"]
    assert counted["documents"] == shown["documents"]["count"]


@pytest.mark.parametrize("as_json", [False, True])
def test_verify_lists_all_problems_and_ends_with_3(run: Run, pool: Path, as_json: bool) -> None:
    shard = pool / "train" / "train-000000.tar"
    data = bytearray(shard.read_bytes())
    data[700] ^= 1
    shard.write_bytes(bytes(data))
    (pool / "validation" / "validation-000000.tar").unlink()
    code, output, error = run("data", "verify", pool, *(["--json"] if as_json else []))
    said = json.dumps(output) if as_json else error
    assert code == 3
    assert "member 000000000.tok.bin are damaged" in said
    assert "validation-000000.tar: missing" in said
    assert "Traceback" not in error


def test_bad_input_ends_with_2_and_says_what_to_change(
    run: Run, source: Path, pool: Path, tmp_path: Path
) -> None:
    bad = tmp_path / "bad.jsonl"
    shutil.copy(source, bad)
    with open(bad, "a") as file:
        file.write("{\n")
    typo, words = tmp_path / "typo.yaml", tmp_path / "words.yaml"
    typo.write_text("sources: [a.txt]\nvocab_size: 500\n")
    words.write_text("just words")
    cases: list[tuple[tuple[object, ...], str]] = [
        (("prepare", tmp_path / "none.txt", "--out", tmp_path / "o"), "no such file"),
        (("prepare", bad, "--out", tmp_path / "o", *OPTIONS), "bad.jsonl:51: not JSON"),
        (
            ("prepare", source, "--out", pool, *OPTIONS, "--vocab-size", 600),
            "other settings (tokenizer.vocab_size: 500 there, 600 given)",
        ),
        (("prepare", source, "--out", tmp_path / "o", "--vocab-size", 9999), "lower vocab_size"),
        (("prepare", source, "--out", tmp_path / "o", "--model-type", "wordpiece"), "model_type"),
        (("prepare", "--settings", tmp_path / "none.yaml"), "cannot read"),
        (("prepare", source, "--settings", typo), "SOURCES cannot be given with --settings"),
        (("prepare", "--settings", typo, "--seed", 17), "--seed cannot be given with --settings"),
        (("prepare", "--settings", typo), "vocab_size; did you mean tokenizer.vocab_size?"),
        (("prepare", "--settings", words), "is not a mapping of settings"),
        (("verify",), "nothing to verify"),
        (("verify", tmp_path), "no manifest.json"),
        (("verify", pool, "--visits", pool), "give one of them"),
        (("inspect", pool / "train" / "manifest.json", "--sequence", 10**6), "does not exist"),
        (("inspect", pool / "train" / "manifest.json", "--seq-length", 0), "1 or more"),
        (("inspect", pool / "train" / "manifest.json", "--step", 3), "--step belongs to a run"),
        (("inspect", pool), "name its manifest"),
    ]
    for arguments, reason in cases:
        code, _, error = run("data", *arguments)
        assert (code, reason in " ".join(error.split())) == (2, True), (arguments, error)
        assert "Traceback" not in error
        assert "pydantic" not in error


def test_nothing_is_left_out_without_a_word(run: Run, source: Path, tmp_path: Path) -> None:
    """Ignored files by ending, skipped records, near-duplicates and the vocabulary are printed."""
    pytest.importorskip("datasketch", reason="needs the data extra")
    folder = tmp_path / "texts"
    folder.mkdir()
    shutil.copy(source, folder / "a.jsonl")
    record = json.loads(source.read_text().splitlines()[3])["text"]
    (folder / "b.text").write_text(record + " And one sentence more.")
    (folder / "c.pdf").write_bytes(b"")
    (folder / "d.jsonl").write_text('{"id": "x\\ud83d", "text": "kept"}\n' + "[" * 200_000 + "\n")
    (folder / "gone.txt").symlink_to(folder / "nowhere")
    Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe9.txt")).write_bytes(b"caf\xe9")
    extra = ("--near-duplicates", 0.8, "--validation-fraction", 0.2, "--workers", 1)
    command = ("data", "prepare", folder, "--out", tmp_path / "pool", *extra)
    code, _, error = run(*command)
    assert (code, "Traceback" in error) == (2, False)
    assert "caf\\udce9.txt: not UTF-8 at byte 3" in error
    code, printed, error = run(*command, "--skip-bad", 3)
    assert (code, "Traceback" in error) == (0, False)
    assert "files ignored: 1 .pdf" in printed
    assert "3 malformed" in printed
    assert "near-duplicates dropped: 1 like an earlier document, 0 training" in printed or (
        "near-duplicates dropped: 0 like an earlier document, 1 training" in printed
    )
    assert "vocabulary: up to 500 ids for " in printed
    assert "vocabulary: up to 500 ids for " in error
    report = json.loads((tmp_path / "pool" / "report.json").read_text())
    assert report["sources"][0]["ignored_files"] == {".pdf": 1}


def test_another_tokenizer_is_refused(run: Run, source: Path, pool: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    assert run("data", "prepare", source, "--out", other, *OPTIONS, "--vocab-size", 501)[0] == 0
    manifest = pool / "train" / "manifest.json"
    model = other / "tokenizer.model"
    code, _, error = run("data", "inspect", manifest, "--tokenizer", model)
    assert code == 2
    assert "another tokenizer" in " ".join(error.split())


def test_inspect_finds_a_step_in_the_log_of_a_run(run: Run, pool: Path, tmp_path: Path) -> None:
    """Three steps of 4 sequences, two of 2, and a present batch size of 8."""
    folder = tmp_path / "run"
    config = compose(
        [
            f"data.train={pool / 'train' / 'manifest.json'}",
            f"data.validation={pool / 'validation' / 'manifest.json'}",
            f"data.tokenizer={pool / 'tokenizer.model'}",
            "data.seq_length=16",
            "data.unique_tokens=640",
            "data.epochs=2",
            "train.global_batch_size=8",
        ]
    )
    save_config(config, folder / "config.yaml")
    log = ({"step": 3, "position_start": 0, "position_stop": 12}, {"step": 3, "validation/x": 1.0})
    rows = [*log, {"step": 5, "position_start": 12, "position_stop": 16}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    for step, expected, logged in ((2, range(4, 8), True), (5, range(14, 16), True)):
        code, output, _ = run("data", "inspect", folder, "--step", step, "--json")
        assert (code, output["step"]["logged"]) == (0, logged)
        assert [entry["position"] for entry in output["shown"]] == list(expected)
    code, text, _ = run("data", "inspect", folder, "--step", 7)
    assert code == 0
    assert "step 7: positions 24 to 32; not in the log, which ends with step 5" in text
    assert text.count("--- position") == 8
    assert run("data", "inspect", folder, "--step", 16)[0] == 2
