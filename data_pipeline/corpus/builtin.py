"""Text that every Python installation carries: the language reference and all docstrings.

This is some 2.5 MB of technical English without a download, the same for everybody with the same
Python. Sources are parsed, never imported.
"""

from __future__ import annotations

import ast
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from data_pipeline.errors import CorpusError

_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}


def builtin_documents() -> Iterator[tuple[str, str]]:
    """Yield (id, text) of every topic of the language reference and of every documented module.

    CorpusError where the standard library is not installed as sources.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    topics = root / "pydoc_data" / "topics.py"
    if not topics.is_file():
        raise CorpusError(
            f"this Python has no {topics}; install its full standard library, or give a text file"
        )
    yield from _topics(topics)
    for path in _modules(root):
        text = _docstrings(path)
        if text:
            yield f"docstrings/{path.relative_to(root).with_suffix('').as_posix()}", text


def _topics(path: Path) -> Iterator[tuple[str, str]]:
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            for name, text in sorted(ast.literal_eval(node.value).items()):
                yield f"reference/{name}", text


def _modules(root: Path) -> Iterator[Path]:
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(f for f in folders if f not in _SKIPPED_FOLDERS)
        yield from (Path(folder) / name for name in sorted(files) if name.endswith(".py"))


def _docstrings(path: Path) -> str:
    """Docstrings of a module in source order, each under the line that declares its owner."""
    try:
        source = path.read_text(encoding="utf-8")
        tree = ast.parse(source)
    except (SyntaxError, ValueError):  # lib2to3 and test data hold broken sources on purpose
        return ""
    lines, parts = source.splitlines(), []
    for node in _statements(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node)
            if text:
                line = 0 if isinstance(node, ast.Module) else node.lineno
                owner = f"{lines[line - 1].strip()}\n" if line else ""
                parts.append((line, f"{owner}{text}\n"))
    return "\n".join(part for _, part in sorted(parts))


def _statements(tree: ast.Module) -> Iterator[ast.AST]:
    """A module and its statements at any depth; expressions, half of a tree, have no docstring."""
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        yield node
        for block in ("body", "orelse", "finalbody", "handlers", "cases"):
            waiting += getattr(node, block, ())
