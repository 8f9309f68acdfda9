"""Checkpoints that any layout writes and any layout reads: atomic, hashed, without pickles."""

from parallel.checkpoint.load import (
    assign_weights,
    latest_checkpoint,
    load_checkpoint,
    load_latest,
    load_weights,
)
from parallel.checkpoint.manifest import Manifest, read_manifest
from parallel.checkpoint.save import save_checkpoint

__all__ = [
    "Manifest",
    "assign_weights",
    "latest_checkpoint",
    "load_checkpoint",
    "load_latest",
    "load_weights",
    "read_manifest",
    "save_checkpoint",
]
