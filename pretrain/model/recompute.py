"""Activations that a layer keeps for its backward pass: all, the expensive ones, or its input.

    none        everything
    selective   results of matrix products and of the attention kernel. Norms, modulations,
                convolutions, rotated queries and keys and the activation of the MLP are recomputed
                from them. No matrix product, attention or collective runs twice, so that this
                costs a few passes over memory
    full        the input of the layer. Its whole forward pass runs again (a third more operations)

A recomputed tensor comes from the same function of the same numbers, and dropout from its key.
Gradients are therefore bit for bit those of a layer that keeps everything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

Mode = Literal["none", "selective", "full"]


@dataclass(frozen=True)
class Recompute:
    """Mode of recomputation of each layer of a pipeline stage."""

    mode: Mode = "none"
    layers: int | None = None
    """Number of layers of each stage, from its first, that recompute; None means all."""

    def of(self, place: int) -> Mode:
        """Mode of the layer at `place` in its stage, counted from 0."""
        return self.mode if self.layers is None or place < self.layers else "none"


class Keep:
    """Replacement of tensors saved for the backward pass by the inputs they are computed from.

        h = norm(x)
        with keep.instead_of(h, norm, x):
            y = linear(h)           # keeps x; recomputes h for the gradient of its weight

    With `active` False nothing changes. One object serves one layer; its contexts nest.
    """

    def __init__(self, active: bool) -> None:
        self.active = active
        self._active: list[_Recomputed] = []

    def instead_of(
        self, result: Tensor, function: Callable[..., Tensor], *inputs: Any
    ) -> AbstractContextManager[None]:
        """Context in which operations that save `result`, or a view of it, keep `inputs` instead.

        `function(*inputs)` must compute `result` again, bit for bit and with the same strides. In a
        compiled layer nothing is replaced: there the compiler chooses what is recomputed.
        """
        if not self.active or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return nullcontext()
        return self._replacing(_Recomputed(result, function, inputs))

    @contextmanager
    def _replacing(self, recomputed: _Recomputed) -> Iterator[None]:
        self._active.append(recomputed)
        try:
            # torch calls only the innermost hooks, so that these search all active contexts.
            with saved_tensors_hooks(self._pack, _unpack):
                yield
        finally:
            self._active.pop()
            recomputed.result = None

    def _pack(self, tensor: Tensor) -> Tensor | _View:
        for recomputed in reversed(self._active):
            if recomputed.holds(tensor):
                return recomputed.view(tensor)
        return tensor  # parameters are not replaced: ZeRO 3 gathers them before the backward pass


class _Recomputed:
    """Function and inputs of a tensor; the tensor itself only while it is needed."""

    def __init__(
        self, result: Tensor, function: Callable[..., Tensor], inputs: tuple[Any, ...]
    ) -> None:
        self.result: Tensor | None = result
        self.stride = result.stride()
        self.function = function
        self.inputs = [x.detach() if isinstance(x, Tensor) else x for x in inputs]
        self.views = self.remaining = 0

    def holds(self, tensor: Tensor) -> bool:
        """True where `tensor` shares the memory of the result."""
        assert self.result is not None
        storage = self.result.untyped_storage().data_ptr()
        return tensor.dtype == self.result.dtype and tensor.untyped_storage().data_ptr() == storage

    def view(self, tensor: Tensor) -> _View:
        """Value to save in place of `tensor`."""
        self.views += 1
        return _View(self, tensor.shape, tensor.stride(), tensor.storage_offset())

    def compute(self) -> Tensor:
        """Result, computed once for all of its views and released after the last one."""
        if self.result is None:
            with torch.no_grad():
                self.result = self.function(*self.inputs)
            assert self.result.stride() == self.stride, "recomputed with other strides"
            self.remaining = self.views
        result, self.remaining = self.result, self.remaining - 1
        if self.remaining == 0:
            self.result = None
        return result


@dataclass(frozen=True)
class _View:
    """View of a recomputed tensor."""

    base: _Recomputed
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int | torch.SymInt


def _unpack(kept: Tensor | _View) -> Tensor:
    if isinstance(kept, Tensor):
        return kept
    return kept.base.compute().as_strided(kept.shape, kept.stride, kept.offset)
