"""Checkpoints that any layout writes and any layout reads: atomic, hashed, without pickles."""

from parallel.checkpoint.background import BackgroundSaver
from parallel.checkpoint.load import (
    assign_weights,
    complete_checkpoints,
    latest_checkpoint,
    load_checkpoint,
    load_latest,
    load_weights,
)
from parallel.checkpoint.manifest import Manifest, manifest_hash, read_manifest
from parallel.checkpoint.reshard import reshard_checkpoint, verify_checkpoint
from parallel.checkpoint.save import save_checkpoint
from parallel.checkpoint.single_file import export_weights, load_file_weights

__all__ = [
    "BackgroundSaver",
    "Manifest",
    "assign_weights",
    "complete_checkpoints",
    "export_weights",
    "latest_checkpoint",
    "load_checkpoint",
    "load_file_weights",
    "load_latest",
    "load_weights",
    "manifest_hash",
    "read_manifest",
    "reshard_checkpoint",
    "save_checkpoint",
    "verify_checkpoint",
]
