"""Writer of safetensors files: one tensor at a time, hashed on the way.

The writer of the library needs all tensors in memory at once; here a rank holds one. The format is
a JSON header with offsets, padded to 8 bytes, and then the raw tensors.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from parallel.checkpoint.manifest import FileEntry

DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16"}
"""Names that the format gives to the types written here."""


class TensorWriter:
    """File of tensors of one type; `append` them in the order of `shapes`, then `close`."""

    def __init__(
        self,
        path: Path,
        shapes: Mapping[str, Sequence[int]],
        dtype: torch.dtype = torch.float32,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
        offset = 0
        self._dtype = dtype
        self._shapes = {name: list(shape) for name, shape in shapes.items()}
        for name, shape in self._shapes.items():
            end = offset + dtype.itemsize * torch.Size(shape).numel()
            header[name] = {"dtype": DTYPES[dtype], "shape": shape, "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._missing = list(self._shapes)
        self._hash = hashlib.sha256()
        self._bytes = 0
        self._file = path.open("wb")
        self._put(len(text).to_bytes(8, "little") + text)

    def append(self, name: str, tensor: Tensor) -> None:
        """Write the next tensor; OSError when the disk refuses."""
        assert self._missing, "all tensors of this file have been written"
        assert name == self._missing.pop(0), "tensors come in the order of the header"
        assert list(tensor.shape) == self._shapes[name], f"{name} has shape {tuple(tensor.shape)}"
        flat = tensor.detach().to(device="cpu", dtype=self._dtype).contiguous().view(-1)
        self._put(memoryview(flat.view(torch.uint8).numpy()))  # type: ignore[arg-type]

    def close(self) -> FileEntry:
        """Flush to the disk; hash and size of the finished file."""
        assert not self._missing, f"tensors were never written: {self._missing}"
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return FileEntry(self._hash.hexdigest(), self._bytes)

    def abandon(self) -> None:
        """Give up on the file: close it and free its space."""
        path = Path(self._file.name)
        with contextlib.suppress(OSError):  # flushing may hit the same full disk again
            self._file.close()
        path.unlink(missing_ok=True)

    def _put(self, data: bytes | memoryview) -> None:
        self._hash.update(data)
        self._file.write(data)
        self._bytes += len(data)
