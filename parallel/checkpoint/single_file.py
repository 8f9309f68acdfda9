"""Weights as one safetensors file: written from any checkpoint, read into any layout.

This is the only form in which weights of others enter a run.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch

from parallel.checkpoint.folder import explain
from parallel.checkpoint.load import own_index
from parallel.checkpoint.manifest import FileEntry, Manifest, verify_files
from parallel.checkpoint.plan import key
from parallel.checkpoint.writer import TensorWriter
from parallel.engine.base import Engine
from parallel.errors import CheckpointError, SaveError
from parallel.weights_file import read_header

LISTED = 5
"""Number of names that a message holds."""


def export_weights(
    path: Path,
    manifest: Manifest,
    out: Path,
    *,
    kind: Literal["weight", "ema"] = "weight",
    dtype: torch.dtype = torch.float32,
    metadata: Mapping[str, str] | None = None,
) -> FileEntry:
    """Write the weights of the checkpoint at `path` to the file `out`, one tensor in memory.

    Raises CheckpointError when the source is damaged, SaveError when `out` exists or cannot be
    written; it appears whole or not at all.
    """
    from safetensors import safe_open

    if out.exists():
        raise SaveError(f"{out} exists already; name another file or remove it")
    source = manifest.tensors[key(next(iter(manifest.shapes)), kind)]
    verify_files(path, manifest, [source])
    partial = out.with_name(f".{out.name}.part")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        writer = TensorWriter(partial, manifest.shapes, dtype, metadata)
        with safe_open(path / source, framework="pt") as opened:
            for name in manifest.shapes:
                writer.append(name, opened.get_tensor(key(name, kind)))
        entry = writer.close()
        os.replace(partial, out)
    except OSError as failure:
        partial.unlink(missing_ok=True)
        raise SaveError(f"{out} could not be written: {explain(failure)}") from None
    return entry


def load_file_weights(engine: Engine, file: Path) -> None:
    """Start an engine from the weights in a file, each rank its slices; collective.

    Names and shapes must be those of the model; CheckpointError lists what differs. Averages begin
    at these weights, the optimizer without state.
    """
    from safetensors import SafetensorError, safe_open

    header = read_header(file)
    check_weights(engine.shapes, {name: entry["shape"] for name, entry in header.items()}, file)
    try:
        with safe_open(file, framework="pt") as opened:
            for name, parameter in engine.parameters.items():
                index = own_index(parameter, engine.topology)
                engine.write(name, "weight", opened.get_slice(name)[index].float())
    except SafetensorError as error:
        raise CheckpointError(f"{file} is not a safetensors file: {error}") from None
    if engine.average is not None:
        engine.average.restart()


def check_weights(
    wanted: Mapping[str, list[int]], found: Mapping[str, list[int]], file: Path
) -> None:
    """Raise CheckpointError, listing missing, unknown and misshapen names, unless they agree."""
    missing = [name for name in wanted if name not in found]
    unknown = [name for name in found if name not in wanted]
    shapes = [
        f"{name} has shape {found[name]}, the model {wanted[name]}"
        for name in wanted
        if name in found and list(found[name]) != list(wanted[name])
    ]
    lines = []
    for what, items in (("missing", missing), ("unknown", unknown), ("other shapes", shapes)):
        if items:
            rest = f" and {len(items) - LISTED} more" if len(items) > LISTED else ""
            lines.append(f"  {what} ({len(items)}): {', '.join(items[:LISTED])}{rest}")
    if lines:
        raise CheckpointError(
            f"{file} does not hold the weights of this model ({len(wanted)} tensors):\n"
            + "\n".join(lines)
            + "\nGive a file of `epochal export` from a run with the same model.* and tokenizer, "
            "or rename and reshape its tensors"
        )
