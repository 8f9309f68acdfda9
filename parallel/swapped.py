"""Reading and writing optimizer state that DeepSpeed has swapped to disk, a sub-group at a time.

DeepSpeed's own accessors read a whole sub-group from disk for every tensor of every parameter. Here
the sub-group of the last access stays in the swapper's buffers until another one is wanted or a
step begins, so that a checkpoint, which goes from parameter to parameter, reads each about once for
weights and once for moments. The buffers are there in any case.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class Window:
    """The one sub-group of this rank's swapped state that is in memory now, if any."""

    def __init__(self, host: Any) -> None:
        self._host = host
        """DeepSpeed's optimizer of stage 3."""
        self._group: int | None = None
        self._changed = False

    def piece(self, parameter: nn.Parameter, kind: str, *, change: bool = False) -> Tensor:
        """This rank's flat float32 piece of the weight or a moment, valid until the next call.

        With `change` what is written to it goes to disk.
        """
        group, start, size = self._host.grad_position[self._host.get_param_id(parameter)]
        self.show(group, change)
        flat = self._host.fp32_partitioned_groups_flat[group]
        held = flat if kind == "weight" else self._host.optimizer.state[flat][kind]
        piece: Tensor = held.detach().narrow(0, start, size)
        return piece

    def show(self, group: int, change: bool = False) -> None:
        """Have this sub-group in memory; with `change` it will be written back."""
        if self._group != group:
            self.close()
            if self._host._swappable_optimizer_subgroup(group):
                self._host._optimizer_states_and_gradient_swap_in(group)
            self._group = group
        self._changed |= change

    def close(self) -> None:
        """Give the buffers back to DeepSpeed, changes written; before every step."""
        group, self._group = self._group, None
        if group is not None and self._host._swappable_optimizer_subgroup(group):
            if self._changed:
                self._host._optimizer_states_and_gradient_swap_out(group)
            else:
                self._host._release_swap_buffers(group)
        self._changed = False

    def forget_moments(self) -> None:
        """Make DeepSpeed's swapper take up anew what the optimizer's state holds."""
        self.close()
        self._host.optimizer_swapper.purge_state()


def window(parameter: nn.Parameter) -> Window | None:
    """The window on the state of this parameter; None where nothing is swapped."""
    host: Any = getattr(parameter, "_z3_optimizer", None)
    if host is None or not host.swap_optimizer:
        return None
    if not hasattr(host, "swap_window"):
        host.swap_window = Window(host)
    found: Window = host.swap_window
    return found
