"""Identity of a preparation: its settings and its input files, as two hashes.

A finished folder is never overwritten by another preparation; an unfinished one is of no use to it
and is begun again.
"""

from __future__ import annotations

import os
import shutil
from hashlib import sha256
from pathlib import Path
from typing import Any

from data_pipeline.corpus.document import Unit
from data_pipeline.errors import DataError
from data_pipeline.prepare.settings import PrepareSettings
from data_pipeline.prepare.tokenise import SPLITS
from data_pipeline.progress import Progress
from data_pipeline.regular import read_regular
from data_pipeline.shards.fields import MANIFEST_BYTES, load_json
from data_pipeline.shards.manifest import canonical_json
from data_pipeline.tokenizer import load_tokenizer


def inputs_sha256(units: list[Unit], settings: PrepareSettings) -> str:
    """Hash of the input files' names, sizes and times: their identity without reading them."""
    rows: list[Any] = []
    for unit in units:
        changed = os.stat(unit.path).st_mtime_ns if unit.bytes else 0
        rows.append([unit.source, unit.label, unit.bytes, changed])
    chosen = settings.tokenizer.path
    if chosen is not None:
        rows.append(load_tokenizer(chosen).sha256)
    return sha256(canonical_json(rows)).hexdigest()


def settings_sha256(settings: PrepareSettings) -> str:
    """Hash of the settings, or that of an earlier version where it finished the folder."""
    report = settings.out / "report.json"
    earlier = settings.earlier_sha256()
    if report.exists() and read_record(report).get("settings_sha256") == earlier:
        return earlier
    return settings.sha256()


def refuse_other_preparation(
    path: Path, identity: dict[str, str], settings: PrepareSettings
) -> None:
    """Raise DataError if `path` reports a finished preparation of other settings or input files."""
    what = _difference(path, identity)
    if what:
        before = read_record(path).get("settings")
        changes = _changes("", before, settings.content()) if before else []
        named = f" ({'; '.join(changes)})" if changes else ""
        raise DataError(
            f"{path.parent} was prepared with other {what}{named}; "
            "choose another output folder, or remove this one to start again"
        )


def _changes(key: str, before: Any, now: Any) -> list[str]:
    """Settings that differ, by their dotted key."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = [*now, *(k for k in before if k not in now)]
        prefix = f"{key}." if key else ""
        return [c for k in keys for c in _changes(f"{prefix}{k}", before.get(k), now.get(k))]
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        rows = enumerate(zip(before, now, strict=True))
        return [c for n, pair in rows for c in _changes(f"{key}.{n}", *pair)]
    return [] if before == now else [f"{key}: {_brief(before)} there, {_brief(now)} given"]


def _brief(value: Any) -> str:
    """Short form of a value: a list by its length, for sources may be long."""
    return f"{len(value)} of them" if isinstance(value, list) else repr(value)


def discard_other_start(out: Path, identity: dict[str, str], progress: Progress) -> None:
    """Remove the files of an unfinished start with other settings or input files."""
    what = _difference(out / ".staging" / "identity.json", identity)
    if what:
        progress.note(f"{what} changed since the unfinished start in {out}: starting again")
        shutil.rmtree(out / ".staging")
        for split in SPLITS:
            for shard in (out / split).glob(f"{split}-*.tar"):
                shard.unlink()
        for tokenizer in out.glob("tokenizer.*"):
            tokenizer.unlink()


def read_record(path: Path) -> dict[str, Any]:
    """Read the JSON object that a preparation left at `path`; DataError if it is damaged."""
    try:
        found = load_json(read_regular(path, MANIFEST_BYTES).decode("utf-8"))
        if not isinstance(found, dict):
            raise ValueError("it is no JSON object")
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path} is damaged ({getattr(error, 'strerror', None) or error}); remove the prepared "
            "folder and prepare the data again, or choose another output folder"
        ) from None
    return found


def _difference(path: Path, identity: dict[str, str]) -> str:
    """Names of the parts of `identity` that differ from those in `path`, joined; empty if none."""
    if not path.exists():
        return ""
    found = read_record(path)
    changed = [key for key in identity if found.get(key) != identity[key]]
    return " and ".join(key.removesuffix("_sha256") for key in changed)
