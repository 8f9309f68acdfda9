"""Where the host asks for a value that the device computes: each time a GPU would be waited for.

On a CPU such reads cost nothing and go unnoticed, so they are counted: operations whose result or
whose shape the host needs (`item`, `nonzero`, a boolean index, ...), and tensors turned into Python
values or sent to the host. What cannot be seen here is a copy from the host's pageable memory.
"""

from __future__ import annotations

import traceback
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
READING = {
    aten._local_scalar_dense,
    aten.nonzero,
    aten.masked_select,
    aten.equal,
    aten._unique,
    aten._unique2,
    aten.unique_dim,
    aten.unique_consecutive,
    aten.bincount,
    aten.is_nonzero,
}
INDEXED = {aten.index, aten.index_put, aten.index_put_, aten._unsafe_index}
CONVERTING = {torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.cpu, torch.Tensor.__array__}


class _Operations(TorchDispatchMode):
    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        packet = func.overloadpacket
        indices = args[1] if packet in INDEXED else ()
        if (
            packet in READING
            or any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in indices)
            or (func is aten.repeat_interleave.Tensor and kwargs.get("output_size") is None)
        ):
            self.found.append(f"{packet} in {_place()}")
        return func(*args, **kwargs)


class _Conversions(TorchFunctionMode):
    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in CONVERTING:
            self.found.append(f"{func.__name__} in {_place()}")
        return func(*args, **(kwargs or {}))


class HostReads:
    """Context in which `found` grows by the name and place of every read."""

    def __init__(self) -> None:
        self.found: list[str] = []
        self._modes = (_Operations(self.found), _Conversions(self.found))

    def __enter__(self) -> HostReads:
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*error)


def _place() -> str:
    """The innermost frame outside torch and this file."""
    for frame in reversed(traceback.extract_stack()):
        if "/torch/" not in frame.filename and frame.filename != __file__:
            parts = frame.filename.split("/")
            return f"{'/'.join(parts[-3:])}:{frame.name}"
    return "?"
