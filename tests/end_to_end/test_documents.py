"""Every block of the documents runs as written, with small settings.

Here the programs of a document run, its files and pieces of configuration are read, and every
command that starts or plans a run is checked without starting it. The slow suite runs the commands
themselves, those of one document one after another in one folder, as a reader does.
"""

from __future__ import annotations

import gzip
import json
import os
import shutil
import subprocess
import time
import tomllib
import urllib.request
from pathlib import Path

import documents
import pytest
import yaml
from documents import DOCUMENTS, ROOT, Block, Command
from harness import run_ranks
from installed import EPOCHAL, command, environment

BLOCKS = [block for name in DOCUMENTS for block in documents.blocks(name)]
COMMANDS = documents.all_commands()
CHECKED = [c for c in COMMANDS if documents.dry_run(c) is not None]
PROGRAMS = [block for block in BLOCKS if block.language == "python" and not block.mark("quoted")]
CONFIGS = [block for block in BLOCKS if block.mark("config") is not None]
FILES = [block for block in BLOCKS if block.mark("file") is not None]
UNUSED_PORT = "5599"


def test_every_block_says_what_it_is() -> None:
    """No block without a language that a test knows, no command in a block that nobody runs."""
    for block in BLOCKS:
        assert block.language in documents.LANGUAGES, block
        marks = {name for name, _ in block.marks}
        assert marks <= {"file", "config", "quoted", "needs"}, block
        if block.language == "text":
            first = {line.split(" ")[0] for line in block.text.splitlines()}
            assert not first & set(documents.PROGRAMS), f"{block}: commands stand in `bash` blocks"
        elif block.language in ("yaml", "json", "toml"):
            assert marks & {"file", "config", "quoted"}, f"{block}: which file is it?"


def test_every_mark_fits_a_command() -> None:
    """A reason for commands that no block has any more is removed with them."""
    for block in [block for block in BLOCKS if block.language == "bash"]:
        reasons = {value.partition(": ")[0] for name, value in block.marks if name == "needs"}
        assert reasons == {c.needs for c in documents.commands(block) if c.needs}, block


@pytest.fixture(scope="session")
def workspace(pool: Path, finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder in which the commands of the documents find what they read."""
    folder = furnish(tmp_path_factory.mktemp("documents"), pool, finished)
    words = ["export", "runs/masked", "masked.safetensors"]
    assert run_ranks(1, command_in, str(folder), words, launcher=False)[0].returncode == 0
    return folder


def furnish(folder: Path, pool: Path, run: Path) -> Path:
    """Put texts, pools, a finished run and the files of the documents into a folder."""
    for name in ("data/builtin", "data/pool", "data/books", "pool"):
        shutil.copytree(pool, folder / name)
    shutil.copytree(run, folder / "runs/masked")
    saved = folder / "runs/masked/config.yaml"
    config = yaml.safe_load(saved.read_text())
    config["run"] |= {"dir": None, "root": str(folder / "runs"), "name": "masked"}
    saved.write_text(yaml.safe_dump(config))
    for name in ("books", "my_texts"):
        (folder / name).mkdir()
        for source in sorted((ROOT / "docs").glob("*.md")):
            for number, part in enumerate(source.read_text().split("\n\n")):
                (folder / name / f"{source.stem}{number}.md").write_text(part)
    with gzip.open(folder / "web.jsonl.gz", "wt") as lines:
        for part in sorted((folder / "books").iterdir()):
            lines.write(json.dumps({"id": part.name, "content": part.read_text()}) + "\n")
    shutil.copytree(ROOT / "cluster", folder / "cluster", ignore=shutil.ignore_patterns("*.pyc"))
    for block in FILES:
        path = folder / str(block.mark("file"))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(documents.shorter(block.text))
    return folder


def command_in(folder: str, words: list[str]):
    """`epochal WORDS` with a working folder."""
    os.chdir(folder)
    return command(words)


def program_in(folder: str, text: str) -> None:
    """Run a Python program in a working folder."""
    os.chdir(folder)
    exec(compile(text, "block", "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("written", CHECKED, ids=str)
def test_a_command_is_legal(written: Command, workspace: Path) -> None:
    words = documents.dry_run(written)
    answer = run_ranks(1, command_in, str(workspace), words, launcher=False)[0]
    assert answer.returncode == 0, answer.stdout + answer.stderr


@pytest.mark.parametrize("block", PROGRAMS, ids=str)
def test_a_program_runs(block: Block, workspace: Path) -> None:
    run_ranks(1, program_in, str(workspace), block.text, launcher=False)


@pytest.mark.parametrize("block", CONFIGS, ids=str)
def test_a_piece_of_configuration_is_accepted(block: Block) -> None:
    from pretrain.config.compose import compose, replace_values

    pieces = yaml.safe_load(block.text)
    values = {f"{section}.{key}": v for section, part in pieces.items() for key, v in part.items()}
    assert replace_values(compose([]), values)


@pytest.mark.parametrize("block", FILES, ids=str)
def test_a_file_can_be_read(block: Block) -> None:
    from data_pipeline.stream.open_stream import Mix

    match block.language:
        case "json":
            assert Mix.model_validate(json.loads(block.text))
        case "toml":
            assert tomllib.loads(block.text)
        case "yaml":
            assert yaml.safe_load(block.text)


@pytest.mark.slow
@pytest.mark.parametrize("document", sorted({c.block.document for c in COMMANDS}))
def test_commands_run(document: str, pool: Path, finished: Path, tmp_path: Path) -> None:
    """One after another in one folder, except those that carry a reason."""
    furnish(tmp_path, pool, finished)
    env = environment() | {"PATH": f"{EPOCHAL.parent}:{os.environ['PATH']}"}
    for written in COMMANDS:
        if written.block.document != document or written.needs:
            continue
        words = documents.real(written.words)
        for made in documents.outputs(words):
            shutil.rmtree(tmp_path / made, ignore_errors=True)
        repository = words[0] in ("make", "bash") or "benchmarks/" in " ".join(words)
        folder = ROOT if repository else tmp_path
        if words[:2] == ["mlflow", "ui"]:
            serves([*words, "--port", UNUSED_PORT], folder, env)
            continue
        answer = subprocess.run(
            " ".join(words) if "$" in " ".join(words) else words,
            shell="$" in " ".join(words),
            cwd=folder,
            env=env,
            capture_output=True,
            text=True,
            timeout=1200,
            check=False,
        )
        assert answer.returncode == 0, f"{written}\n{answer.stdout}{answer.stderr}"


def serves(words: list[str], folder: Path, env: dict[str, str], seconds: float = 120) -> None:
    """Start a server, get its first page, stop it."""
    words = [word.replace("$PWD", str(folder)) for word in words]
    server = subprocess.Popen(words, cwd=folder, env=env, start_new_session=True)
    try:
        end = time.monotonic() + seconds
        while True:
            try:
                page = f"http://127.0.0.1:{UNUSED_PORT}/"
                assert urllib.request.urlopen(page, timeout=5).status == 200
                return
            except OSError:
                assert server.poll() is None, "the server ended"
                assert time.monotonic() < end, f"no answer in {seconds} s"
                time.sleep(0.5)
    finally:
        os.killpg(server.pid, 15)
        server.wait(timeout=30)
