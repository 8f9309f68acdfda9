"""The machine and the code that a figure was measured with."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

import torch


def commit() -> str:
    """Commit of this checkout, marked where it has changes.

    Outside git it is the environment's COMMIT, or `unknown`.
    """
    root = Path(__file__).resolve().parents[1]
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=10"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except FileNotFoundError:  # no git on this machine
        found = ""
    return found or os.environ.get("COMMIT", "unknown")


def hardware(device: str = "cpu") -> str:
    """Name of the GPU, or the processor's architecture."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    return platform.processor() or platform.machine()
