"""Activations that a layer keeps for its backward pass: all, the expensive ones, or its input.

    none        everything
    selective   results of matrix products and of the attention kernel; norms, modulations, rotated
                queries and keys and the activation of the MLP are made again from them. No matrix
                product, attention or collective runs twice, so that this costs a few passes over
                memory
    full        the input of the layer; its whole forward pass runs again (a third more operations)

Whatever is made again is made by the same function of the same numbers, dropout by its key, so
that gradients are bit for bit those of a layer that keeps everything.
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
    """Amount that the layers of a stage keep."""

    mode: Mode = "none"
    layers: int | None = None
    """Concerns the first so many layers of each stage; None all of them."""

    def of(self, place: int) -> Mode:
        """Mode of the layer at `place` in its stage."""
        return self.mode if self.layers is None or place < self.layers else "none"


class Keep:
    """Lets saved tensors be replaced by what they are made of.

        h = norm(x)
        with keep.instead_of(h, norm, x):
            y = linear(h)           # keeps x, makes h again when its weight's gradient needs it

    `active` False changes nothing. One object serves the parts of one layer, whose contexts nest.
    """

    def __init__(self, active: bool) -> None:
        self.active = active
        self._recipes: list[_Recipe] = []

    def instead_of(
        self, made: Tensor, make: Callable[..., Tensor], *inputs: Any
    ) -> AbstractContextManager[None]:
        """Inside, whatever saves `made` or a view of it for the backward pass keeps `inputs`.

        `make(*inputs)` must give `made` again, bit for bit and in the same strides. In a compiled
        layer nothing is replaced: there the compiler chooses what is made again.
        """
        if not self.active or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return nullcontext()
        return self._replacing(_Recipe(made, make, inputs))

    @contextmanager
    def _replacing(self, recipe: _Recipe) -> Iterator[None]:
        self._recipes.append(recipe)
        try:
            # Only the innermost hooks are called: they look through the recipes of all.
            with saved_tensors_hooks(self._pack, _unpack):
                yield
        finally:
            self._recipes.pop()
            recipe.made = None

    def _pack(self, tensor: Tensor) -> Tensor | _View:
        for recipe in reversed(self._recipes):
            if recipe.holds(tensor):
                return recipe.view(tensor)
        return tensor  # parameters stay themselves: ZeRO 3 gathers them again before they are read


class _Recipe:
    """Recipe of a tensor, and for a moment the tensor."""

    def __init__(self, made: Tensor, make: Callable[..., Tensor], inputs: tuple[Any, ...]) -> None:
        self.made: Tensor | None = made
        self.stride = made.stride()
        self.make = make
        self.inputs = [x.detach() if isinstance(x, Tensor) else x for x in inputs]
        self.views = self.left = 0

    def holds(self, tensor: Tensor) -> bool:
        """True where `tensor` lies in the memory of a recomputed one."""
        assert self.made is not None
        own = self.made.untyped_storage().data_ptr()
        return tensor.dtype == self.made.dtype and tensor.untyped_storage().data_ptr() == own

    def view(self, tensor: Tensor) -> _View:
        """Value kept in place of `tensor`."""
        self.views += 1
        return _View(self, tensor.shape, tensor.stride(), tensor.storage_offset())

    def again(self) -> Tensor:
        """The tensor, made once for all of its views and let go after the last."""
        if self.made is None:
            with torch.no_grad():
                self.made = self.make(*self.inputs)
            assert self.made.stride() == self.stride, "made again in another layout"
            self.left = self.views
        made, self.left = self.made, self.left - 1
        if self.left == 0:
            self.made = None
        return made


@dataclass(frozen=True)
class _View:
    """A part of what a recipe makes."""

    recipe: _Recipe
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int | torch.SymInt


def _unpack(kept: Tensor | _View) -> Tensor:
    if isinstance(kept, Tensor):
        return kept
    return kept.recipe.again().as_strided(kept.shape, kept.stride, kept.offset)
