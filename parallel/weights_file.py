"""Header of a file of weights: readable without torch, before any rank starts.

Only safetensors are read. Pickles (.pt, .bin, .ckpt) can run code when they are opened.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from parallel.errors import CheckpointError

PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle")
FLOATS = ("F64", "F32", "F16", "BF16")


def read_header(file: Path) -> dict[str, Any]:
    """Names, types and shapes in a safetensors file, without reading tensors (and without torch).

    Raises CheckpointError for anything else, pickles above all.
    """
    if file.suffix.lower() in PICKLES:
        raise CheckpointError(
            f"{file} is a pickle, which can run code when it is opened; it is not read here. "
            "Convert it where you trust it: safetensors.torch.save_file(state_dict, FILE)"
        )
    try:
        with file.open("rb") as opened:
            size = int.from_bytes(opened.read(8), "little")
            if not 0 < size <= file.stat().st_size - 8:
                raise ValueError("its header does not fit into it")
            header = json.loads(opened.read(size))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            if entry["dtype"] not in FLOATS:
                raise CheckpointError(
                    f"{file}: {name} has type {entry['dtype']}; weights are {', '.join(FLOATS)}"
                )
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file} is not a safetensors file: {error}") from None
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror}") from None
    return dict(header)
