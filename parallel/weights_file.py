"""Header of a file of weights: readable without torch, before any rank starts.

Only safetensors are read. Pickles (.pt, .bin, .ckpt) can run code when they are opened.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from parallel.errors import CheckpointError
from parallel.files import JSON_BYTES, open_regular, parse_json

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
        with open_regular(file) as opened:
            size = int.from_bytes(opened.read(8), "little")
            if not 0 < size <= file.stat().st_size - 8:
                raise ValueError("its header does not fit into it")
            if size > JSON_BYTES:
                raise ValueError(f"its header is larger than {JSON_BYTES:,} bytes")
            header = parse_json(opened.read(size))
        if not isinstance(header, dict):
            raise ValueError("its header is no JSON object")
        header.pop("__metadata__", None)
        for name, entry in header.items():
            _check_entry(name, entry)
    except ValueError as error:
        raise CheckpointError(f"{file} is not a safetensors file: {error}") from None
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror}") from None
    return header


def _check_entry(name: str, entry: Any) -> None:
    """Raise ValueError unless the entry of a tensor has a floating-point type and a shape."""
    match entry:
        case {"dtype": str(dtype), "shape": list(shape)}:
            if dtype not in FLOATS:
                raise ValueError(f"{name} has type {dtype}; weights are {', '.join(FLOATS)}")
            if not all(type(size) is int and size >= 0 for size in shape):
                raise ValueError(f"{name} has no shape")
        case _:
            raise ValueError(f"{name} has no type and shape")
