"""Exponential moving average of the weights: float32, sharded exactly as the optimizer is.

The average of each tensor that is updated on this rank lies in the optimizer's state of it, so that
ZeRO shards it, checkpoints reshard it, and an update is one fused pass without communication. It
costs four bytes a parameter, sharded as the state is. Forward passes use it only inside
`in_forward_passes`, which handles one parameter at a time and needs no second copy of the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from parallel.engine import fragments
from parallel.engine.optimizer import EMA, WEIGHT, Kind


class WeightAverage:
    """ema <- d ema + (1 - d) w after every applied update, from the weights it was started with.

    With `warmup` d = min(decay, (1 + n) / (10 + n)) after n updates, so that the average forgets
    its random start (the customary form; diffusion language models are evaluated with it).
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        decay: float,
        warmup: bool,
    ) -> None:
        assert 0.0 < decay < 1.0, f"decay {decay} is no average"
        self._parameters, self._optimizer = parameters, optimizer
        self._decay, self._warmup = decay, warmup
        self.in_use = False
        """True while forward passes use the average."""

    def decay_at(self, updates: int) -> float:
        """Value of d at the `updates`-th update, counted from 1."""
        if not self._warmup:
            return self._decay
        return min(self._decay, (1 + updates) / (10 + updates))

    @torch.no_grad()
    def restart(self) -> None:
        """Make the present weights the average."""
        held, averages = self._pairs()
        torch._foreach_copy_(averages, held)

    @torch.no_grad()
    def update(self, updates: int) -> None:
        """Average in the weights after the `updates`-th applied update, each rank its shard."""
        held, averages = self._pairs()
        torch._foreach_lerp_(averages, held, 1.0 - self.decay_at(updates))

    @contextmanager
    def in_forward_passes(self) -> Iterator[None]:
        """Context in which forward passes use the average; afterwards the weights are as before,
        bit for bit. Collective. Neither step nor save inside.
        """
        assert not self.in_use, "the average is in use already"
        self._set_forward_weights(EMA)
        self.in_use = True
        try:
            yield
        finally:
            self._set_forward_weights(WEIGHT)
            self.in_use = False

    @torch.no_grad()
    def _set_forward_weights(self, kind: Kind) -> None:
        """Let forward passes use averages or weights, one parameter at a time."""
        for parameter in self._parameters.values():
            if not parameter.requires_grad:
                continue
            if fragments.has_fp32_copy(parameter):
                part = fragments.read_slice(parameter, kind, self._optimizer)
                fragments.set_forward_weight(parameter, part)
            else:
                # The parameter is the only copy of the weight: the two change places.
                average = self._optimizer.state[parameter][EMA]
                former = parameter.detach().clone()
                parameter.copy_(average)
                average.copy_(former)

    def _pairs(self) -> tuple[list[Tensor], list[Tensor]]:
        """Tensors that are updated on this rank, and their averages."""
        held = fragments.updated_tensors(self._parameters.values(), self._optimizer)
        averages = [self._optimizer.state[tensor][EMA] for tensor, _ in held]
        return [tensor.detach() for tensor, _ in held], averages
