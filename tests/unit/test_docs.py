"""The documents name files, tests and headings that exist, quote code as it is, and fit a page.

They are checked as text, without a Markdown parser: code spans and fenced blocks count too, because
most paths stand there.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [
    "README.md",
    "CONTRIBUTING.md",
    *sorted(f"docs/{file.name}" for file in (ROOT / "docs").glob("*.md")),
]
FOLDERS = "pretrain|parallel|data_pipeline|configs|tests|cluster|docs|benchmarks"
PATH = re.compile(rf"(?<![\w./-])(?:{FOLDERS})/[\w./-]*")
MODULE = re.compile(r"(?<![\w./-])(?:pretrain|data_pipeline|cluster)(?:\.(?!md\b)\w+)+")
"""Not `parallel.`, which is also a section of the configuration."""
FILE = re.compile(r"(?<![\w./-])[\w/-]+\.py\b")
TEST = re.compile(r"`([\w/-]+\.py)::(\w+)")
LINK = re.compile(r"\]\(([^()\s]+)\)")
QUOTED = re.compile(r"<!-- quoted: (\S+) -->\n```\w*\n(.*?)```", re.DOTALL)
WIDTH = 100

each_document = pytest.mark.parametrize("document", DOCUMENTS)


def without_blocks(text: str) -> str:
    """The text with the lines of fenced blocks left empty."""
    return re.sub(r"^```.*?^```", lambda m: "\n" * m[0].count("\n"), text, flags=re.M | re.S)


def headings(document: Path) -> Iterator[str]:
    """Anchors of all headings, as GitHub makes them."""
    for title in re.findall(r"^#+ (.+)$", without_blocks(document.read_text()), re.MULTILINE):
        plain = re.sub(r"[^\w\- ]", "", title.lower())
        yield plain.strip().replace(" ", "-")


def source(dotted: str) -> bool:
    """Whether a dotted name is a module, or stands in one."""
    *parts, last = dotted.split(".")
    path = ROOT.joinpath(*parts)
    if (path / last).is_dir() or (path / f"{last}.py").is_file():
        return True
    module = path.with_suffix(".py") if path.with_suffix(".py").is_file() else path / "__init__.py"
    return module.is_file() and re.search(rf"\b{last}\b", module.read_text()) is not None


def files_named(name: str) -> list[Path]:
    """Files of the repository whose path is, or ends with, `name`."""
    top = name.split("/")[0]
    places = [ROOT / top] if (ROOT / top).is_dir() else [ROOT / f for f in FOLDERS.split("|")]
    found = [path for place in places for path in place.rglob(name.rsplit("/", 1)[-1])]
    return [path for path in found if f"/{path.relative_to(ROOT)}".endswith(f"/{name}")]


@each_document
def test_paths_and_modules_exist(document: str) -> None:
    text = (ROOT / document).read_text()
    paths = {path.rstrip(".") for path in PATH.findall(text)}
    missing = [path for path in sorted(paths) if not (ROOT / path).exists()]
    missing += [name for name in sorted(set(FILE.findall(text))) if not files_named(name)]
    missing += [name for name in sorted(set(MODULE.findall(text))) if not source(name)]
    assert not missing, f"{document} names {', '.join(missing)}"


@each_document
def test_named_tests_exist(document: str) -> None:
    for file, function in TEST.findall((ROOT / document).read_text()):
        found = [path.read_text() for path in files_named(file)]
        assert any(f"def {function}(" in text for text in found), f"{file}::{function}"


@each_document
def test_links_lead_somewhere(document: str) -> None:
    broken = []
    for target in LINK.findall(without_blocks((ROOT / document).read_text())):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        file = (ROOT / document).parent / name if name else ROOT / document
        if not file.exists() or (anchor and anchor not in headings(file)):
            broken.append(target)
    assert not broken, f"{document} links to {', '.join(broken)}"


@each_document
def test_quotations_are_what_the_files_say(document: str) -> None:
    text = (ROOT / document).read_text()
    quotations = QUOTED.findall(text)
    assert len(quotations) == text.count("<!-- quoted:"), "a quotation without its fenced block"
    for file, block in quotations:
        assert block in (ROOT / file).read_text(), f"{file} does not say\n{block}"


@each_document
def test_lines_fit_a_page(document: str) -> None:
    """Tables, images and fenced blocks may be wider: their lines cannot be wrapped."""
    lines = enumerate(without_blocks((ROOT / document).read_text()).splitlines(), start=1)
    wide = [n for n, line in lines if len(line) > WIDTH and not line.startswith(("|", "!["))]
    assert not wide, f"{document}: lines {wide} have more than {WIDTH} columns"


def test_the_glossary_is_in_order_and_in_use() -> None:
    """Terms stand in alphabetical order; each is linked from another document."""
    terms = list(headings(ROOT / "docs/glossary.md"))[1:]
    assert terms == sorted(terms)
    others = [(ROOT / name).read_text() for name in DOCUMENTS if "glossary" not in name]
    unused = [term for term in terms if not any(f"glossary.md#{term})" in text for text in others)]
    assert not unused, f"nobody links to {', '.join(unused)}"


def test_every_fault_has_a_test() -> None:
    """One row a kind of fault, at least 60; each names the test that plays it."""
    text = (ROOT / "docs/reliability.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| ") and "| test |" not in line]
    assert len(rows) >= 60
    without = [row for row in rows if not re.search(r"`tests/[\w/]+\.py(::\w+)?`", row)]
    assert not without
