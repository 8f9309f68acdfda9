"""`epochal export` and `epochal reshard`: what can be done with a checkpoint besides training on.

Both take a run folder (its newest checkpoint) or the folder of one checkpoint, need no process
group and no more memory than the largest tensor.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch

from parallel.checkpoint import (
    Manifest,
    export_weights,
    latest_checkpoint,
    read_manifest,
    reshard_checkpoint,
    verify_checkpoint,
)
from parallel.checkpoint.manifest import NAME
from pretrain.config.secrets import without_secrets
from pretrain.errors import ConfigError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def find_checkpoint(place: Path) -> Path:
    """The checkpoint at `place`, or the newest of the run there; ConfigError when there is none."""
    if (place / NAME).is_file():
        return place
    found = latest_checkpoint(place / "checkpoints")
    if found is None:
        raise ConfigError(
            f"{place} is neither a checkpoint nor a run that holds one; give a run folder, or a "
            "folder step-... below its checkpoints"
        )
    return found


def export_checkpoint(
    place: Path,
    out: Path,
    *,
    weights: Literal["ema", "raw"] | None = None,
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> dict[str, Any]:
    """Write the weights at `place` into the safetensors file `out`; what was written.

    Averaged weights where there are any, unless `weights` insists. The file's metadata hold the
    step, the configuration, the tokenizer's identity and the hash of what it was made from.
    """
    if out.suffix != ".safetensors":
        raise ConfigError(f"the output is {out}; name a file that ends with .safetensors")
    path = find_checkpoint(place)
    manifest = read_manifest(path)
    chosen = weights or ("ema" if manifest.has_ema else "raw")
    if chosen == "ema" and not manifest.has_ema:
        raise ConfigError(
            f"{path} holds no averaged weights: its run had train.ema_decay 0; take --weights raw"
        )
    kind: Literal["weight", "ema"] = "ema" if chosen == "ema" else "weight"
    metadata = describe(manifest) | {"weights": chosen, "dtype": dtype}
    entry = export_weights(
        path, manifest, out, kind=kind, dtype=DTYPES[dtype], metadata={"format": "pt"} | metadata
    )
    return {
        "file": str(out),
        "checkpoint": str(path),
        "step": manifest.step,
        "weights": chosen,
        "dtype": dtype,
        "tensors": len(manifest.shapes),
        **asdict(entry),
    }


def describe(manifest: Manifest) -> dict[str, str]:
    """Metadata of a file of weights about their origin."""
    state = manifest.state
    return {
        "step": str(manifest.step),
        # An earlier version kept the password of a tracking server.
        "config": json.dumps(without_secrets(state.get("config", {})), sort_keys=True),
        "objective_state": json.dumps(state.get("objective", {}), sort_keys=True),
        "tokenizer": json.dumps(state.get("tokenizer", {}), sort_keys=True),
        "source_sha256": json.dumps(
            {name: entry.sha256 for name, entry in manifest.files.items()}, sort_keys=True
        ),
    }


def reshard(
    place: Path, out: Path | None, *, weights_only: bool = False, files: int | None = None
) -> dict[str, Any]:
    """Verify the checkpoint at `place` and, with `out`, write it again below that folder."""
    path = find_checkpoint(place)
    manifest = verify_checkpoint(path)
    result = {
        "checkpoint": str(path),
        "step": manifest.step,
        "verified_files": len(manifest.files),
        "bytes": sum(entry.bytes for entry in manifest.files.values()),
    }
    if out is None:
        if weights_only or files is not None:
            raise ConfigError("without --to the checkpoint is only verified; name a folder by --to")
        return result
    made = reshard_checkpoint(
        path, out, weights_only=weights_only, files=files, change_state=without_secrets
    )
    copied = read_manifest(made)
    return result | {
        "written": str(made),
        "written_files": len(copied.files),
        "written_bytes": sum(entry.bytes for entry in copied.files.values()),
    }
