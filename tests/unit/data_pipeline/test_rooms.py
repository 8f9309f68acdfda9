"""The direction of imports between the rooms of the data pipeline."""

from __future__ import annotations

import ast
from pathlib import Path

import data_pipeline

ROOT = Path(data_pipeline.__file__).parent
MAY_IMPORT: dict[str, set[str]] = {
    "corpus": set(),
    "shards": set(),
    "tokenizer": {"shards"},
    "prepare": {"corpus", "tokenizer", "shards"},
    "stream": {"shards", "tokenizer"},
}
FOR_ALL = {"errors", "json_keys", "progress", "regular"}


def test_rooms_import_in_one_direction() -> None:
    """Each room imports those that the table allows, wherever in the file it does so."""
    assert {path.parent.name for path in ROOT.glob("*/__init__.py")} == set(MAY_IMPORT)
    breaches = []
    for room, allowed in MAY_IMPORT.items():
        for file in (ROOT / room).glob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.ImportFrom) and node.module:
                    first, _, rest = node.module.partition(".")
                    other = rest.partition(".")[0]
                    if first == "data_pipeline" and other not in {room, *allowed, *FOR_ALL}:
                        breaches.append(f"{room}/{file.name} imports {node.module}")
    assert not breaches, "\n".join(breaches)
