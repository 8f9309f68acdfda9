"""Folders of checkpoints: an unfinished one is hidden, one rename makes it exist.

Only rank 0 calls these. Errors of the file system come back as text, for the ranks to agree on.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from parallel.checkpoint.manifest import (
    NAME,
    Manifest,
    read_manifest,
    sync_folder,
    write_synced,
)
from parallel.errors import CheckpointError

log = logging.getLogger(__name__)

KEEP = "keep"
"""Empty file in the folder of a checkpoint that is never removed; a person may make it too."""


@dataclass(frozen=True)
class Target:
    """Place of one checkpoint, and which checkpoints stay once it is complete."""

    folder: Path
    step: int
    keep: int = 0
    """Number of newest complete checkpoints that stay, beside those that are never removed; 0 means
    every one."""
    forever: bool = False
    """True where this one is never removed."""

    @property
    def final(self) -> Path:
        """Folder of the complete checkpoint."""
        return self.folder / f"step-{self.step:08d}"

    @property
    def partial(self) -> Path:
        """Folder while it is written."""
        return self.folder / f".tmp-step-{self.step:08d}"


def make_empty(target: Target) -> None:
    """Make an empty folder to write into; remove first what a killed save left behind."""
    target.folder.mkdir(parents=True, exist_ok=True)
    for left in target.folder.glob(".tmp-step-*"):
        shutil.rmtree(left)
    target.partial.mkdir()


def commit(manifest: Manifest, target: Target) -> None:
    """Write the manifest and rename; from then on the checkpoint exists. Then remove old ones."""
    partial, final = target.partial, target.final
    if target.forever or (final / KEEP).exists():
        write_synced(partial / KEEP, "")
    write_synced(partial / NAME, manifest.to_json())
    sync_folder(partial)
    if final.exists():
        # The same step again. A crash between the two renames costs this step, no earlier one.
        aside = final.with_name(f".tmp-{final.name}-replaced")
        os.rename(final, aside)
        os.rename(partial, final)
        shutil.rmtree(aside)
    else:
        os.rename(partial, final)
    sync_folder(final.parent)
    if target.keep > 0:
        _prune(target.folder, target.keep)


def attempt(action: Callable[[], object]) -> str | None:
    """Run a file operation; return its error as text, or None."""
    try:
        action()
    except OSError as failure:
        return explain(failure)
    return None


def explain(failure: OSError) -> str:
    """Message of the file system, with the file it is about."""
    return f"{failure.strerror or failure} ({failure.filename or 'while writing'})"


def _prune(folder: Path, keep: int) -> None:
    """Remove the oldest complete checkpoints beyond `keep`.

    Damaged ones stay for a person. Those with a file `KEEP` stay and are not counted.
    """
    complete = []
    for path in sorted(folder.glob("step-*"), reverse=True):
        try:
            read_manifest(path)
        except CheckpointError:
            continue
        if not (path / KEEP).exists():
            complete.append(path)
    for path in complete[keep:]:
        aside = path.with_name(f".tmp-{path.name}-pruned")
        error = attempt(lambda old=path, new=aside: os.rename(old, new))  # type: ignore[misc]
        if error is not None:
            log.warning("the old checkpoint %s could not be removed: %s", path, error)
            continue
        shutil.rmtree(aside, ignore_errors=True)
