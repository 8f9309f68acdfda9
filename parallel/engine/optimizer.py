"""Declaration of an optimizer: the state that it keeps and the layouts in which it is legal.

It is written once, with the settings of the optimizer. The engine creates and restores the state by
it, checkpoints name tensors by it, the planner counts bytes by it. Free of torch, so that planning
and checking need none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from parallel.errors import LayoutError
from parallel.layout.rules import Layout, effective_stage

if TYPE_CHECKING:
    import torch

Kind = str
"""Kind of a tensor that belongs to a parameter: its weight, a state of the optimizer by its name,
its average, or the weight of the teacher."""
WEIGHT: Kind = "weight"
EMA: Kind = "ema"
"""The averaged weight (`parallel.engine.average`): lies in the optimizer's state, which ignores it.
"""
TEACHER: Kind = "teacher"
"""The weight of a frozen copy of the model, which the engine carries without training it."""
COUNTER = "step"
"""Name of the number of updates in the state of a tensor, as torch's optimizers have it."""

_BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class StateTensor:
    """State that an optimizer keeps of every tensor it updates: same shape, zero at the start.

    A checkpoint holds it in float32, whole, under `NAME/PARAMETER`.
    """

    name: str
    dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        assert self.name.isidentifier(), f"{self.name!r} is no name of a state"
        taken = (WEIGHT, EMA, TEACHER, COUNTER)
        assert self.name not in taken, f"the state {self.name} has the name of something else"

    @property
    def element_bytes(self) -> int:
        """Bytes of an element."""
        return _BYTES[self.dtype]


@dataclass(frozen=True)
class StateGroup:
    """State of the parameters that an optimizer updates by one rule."""

    name: str
    """Value of `state_group` in each of the `param_groups` that hold these parameters."""
    state: tuple[StateTensor, ...]
    counter: Literal["tensor", "int"] | None = "tensor"
    """As `OptimizerSpec.counter`."""

    @property
    def names(self) -> tuple[Kind, ...]:
        """Names of its state."""
        return tuple(tensor.name for tensor in self.state)

    @property
    def element_bytes(self) -> int:
        """Bytes of state for each element."""
        return sum(tensor.element_bytes for tensor in self.state)

    @property
    def counter_bytes(self) -> int:
        """Bytes of the number of updates of a tensor."""
        return 4 if self.counter == "tensor" else 0


def one_group(parameter: str, shape: Sequence[int]) -> str:
    """Group of every parameter of an optimizer that has one rule."""
    return ""


@dataclass(frozen=True)
class OptimizerSpec:
    """An optimizer as engine, checkpoints and planner know it.

    Its `step` reads `param_groups` anew at each call and may be called for one group after the
    other, leaves a parameter without a gradient alone, and keeps nothing outside of `state`.
    """

    name: str
    """Name in messages."""
    state: tuple[StateTensor, ...]
    """State of every parameter that `group_of` puts into no other group."""
    build: Callable[[list[dict[str, Any]]], torch.optim.Optimizer] = field(
        compare=False, repr=False
    )
    """Function that makes it from groups with `params`, `weight_decay`, `lr_scale`, `eps_scale`
    (a factor of the term that keeps a divisor from 0) and `state_group`, and imports what it needs.
    The engine sets `lr` of every group before each step.
    """
    counter: Literal["tensor", "int"] | None = "tensor"
    """Form of the number of updates that it keeps of every tensor as `state["step"]`: float32 0-d,
    or a Python number; None if it counts nothing. Checkpoints hold the number once."""
    elementwise: bool = True
    """True: the update of an element depends on that element alone. False: it needs whole tensors,
    while tensor parallelism and ZeRO 1 to 3 would hand it slices."""
    offload: bool = True
    """True if it can update in host memory."""
    groups: tuple[StateGroup, ...] = ()
    """Groups of parameters with another rule and other state."""
    group_of: Callable[[str, Sequence[int]], str] = field(
        default=one_group, compare=False, repr=False
    )
    """Function from canonical name and whole shape of a parameter to the name of its group; "" is
    the group of `state`. It gives the same for all layers."""

    def group_named(self, name: str) -> StateGroup:
        """State group of this name."""
        everything = (StateGroup("", self.state, self.counter), *self.groups)
        return next(group for group in everything if group.name == name)

    def group(self, parameter: str, shape: Sequence[int]) -> StateGroup:
        """State group of a parameter."""
        return self.group_named(self.group_of(parameter, shape))

    @property
    def names(self) -> tuple[Kind, ...]:
        """Names of the state of all groups, each once."""
        groups = (self.group_named(name) for name in ("", *(g.name for g in self.groups)))
        return tuple(dict.fromkeys(name for group in groups for name in group.names))


def check_optimizer(
    spec: OptimizerSpec, layout: Layout, zero_stage: int, precision: str, offload: str = "none"
) -> None:
    """Refuse, by LayoutError, layouts under which an optimizer would compute something else."""
    if offload != "none" and not spec.offload:
        raise LayoutError(
            f"optimizer {spec.name} cannot update in host memory; set parallel.offload to none"
        )
    if spec.elementwise:
        return
    stage = effective_stage(layout, zero_stage, precision, offload)
    if stage > 0:
        raise LayoutError(
            f"optimizer {spec.name} updates whole tensors and needs parallel.zero_stage 0 (or one "
            f"data-parallel rank in float32), not {stage}: ZeRO hands it slices of flat tensors"
        )
    if layout.tensor_parallel_size > 1:
        raise LayoutError(
            f"optimizer {spec.name} updates whole tensors and needs parallel.tensor_parallel_size "
            f"1, not {layout.tensor_parallel_size}: a rank would hand it slices of matrices"
        )
