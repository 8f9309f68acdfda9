"""Pools and checkpoints as an attacker would write them: changed content under right hashes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

from data_pipeline.shards.manifest import canonical_json

RUN = Path(__file__).parents[1] / "fixtures" / "run_0_1_0"
"""Run of an earlier version: a pool and a checkpoint."""
Change = Callable[[dict[str, Any]], object]


def forge_pool(folder: Path, change: Change) -> Path:
    """Copy the training pool with a changed manifest; return the manifest."""
    shutil.copytree(RUN / "pool" / "train", folder)
    content = json.loads((folder / "manifest.json").read_text())
    del content["manifest_sha256"]
    change(content)
    return write_pool_manifest(folder / "manifest.json", content)


def write_pool_manifest(path: Path, content: dict[str, Any]) -> Path:
    """Write the content of a pool's manifest with its hash."""
    digest = sha256(canonical_json(content)).hexdigest()
    path.write_text(json.dumps({"manifest_sha256": digest, **content}))
    return path


def forge_checkpoint(folder: Path, change: Change, step: int = 8) -> Path:
    """Copy the checkpoint with a changed manifest; return its folder."""
    path = folder / f"step-{step:08d}"
    shutil.copytree(RUN / "checkpoints" / "step-00000008", path)
    content = json.loads((path / "manifest.json").read_text())
    change(content)
    (path / "manifest.json").write_text(json.dumps(content))
    return path


def replace_file(path: Path, name: str, data: bytes) -> None:
    """Replace a file of the checkpoint at `path` and state its size and hash in the manifest."""
    (path / name).write_bytes(data)
    content = json.loads((path / "manifest.json").read_text())
    content["files"][name] = {"bytes": len(data), "sha256": sha256(data).hexdigest()}
    (path / "manifest.json").write_text(json.dumps(content))
