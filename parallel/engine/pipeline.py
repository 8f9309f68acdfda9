"""Host of layouts with a pipeline: DeepSpeed's PipelineEngine at ZeRO stage 1.

Each rank's module is one stage of the model, and to DeepSpeed one opaque layer. Its protocol is
that of any module here with one more argument: `module(batch, carried=tensors)` continues what the
stage before returned, a tuple of float tensors; the last stage returns the loss (or the bound).
Only these tensors travel. Whatever else a stage needs it takes from its own copy of the batch,
which every rank of the pipeline has anyway, as data and noise are functions of the position.

A module whose first and last stage share parameters names them in `tied_parameters`.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel.engine.base import Engine, StepResult
from parallel.engine.optimizer import Kind
from parallel.engine.settings import EngineConfig, deepspeed_config
from parallel.layout.topology import Topology


class StageRunner(nn.Module):
    """Stage as DeepSpeed sees it: tensors of the stage before in, tensors for the next one out."""

    def __init__(self, stage: nn.Module, topology: Topology) -> None:
        super().__init__()
        self.stage = stage
        self.first, self.last = topology.is_first_stage, topology.is_last_stage
        self.queue: list[Any] = []
        """Micro-batches of this step that are still to run; 1F1B keeps their order."""
        self.scale = 1.0
        """Factor of the loss of a micro-batch."""
        self.prefetch_next: Callable[[], object] = lambda: None
        """Work of the host after each forward pass."""

    def forward(self, carried: Tensor | tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
        """Run the next micro-batch through the stage."""
        batch = self.queue.pop(0)
        if self.first:
            out = self.stage(batch)
        else:
            out = self.stage(batch, carried=carried if isinstance(carried, tuple) else (carried,))
        self.prefetch_next()
        return out * self.scale if self.last else out


class PipelineEngine(Engine):
    """One-forward-one-backward schedule over the stages."""

    def __init__(
        self,
        module: nn.Module,
        param_groups: Sequence[dict[str, Any]],
        config: EngineConfig,
        topology: Topology,
    ) -> None:
        import deepspeed

        super().__init__(module, param_groups, config, topology)
        self._runner = StageRunner(module, topology)
        self.deepspeed, *_ = deepspeed.initialize(
            model=_pipeline_module(self._runner, self._tied(), topology),
            optimizer=self.optimizer,
            config=deepspeed_config(config, topology, self._largest),
        )
        _check_ranks(self.deepspeed.grid, topology)
        self._owner = self._index_parameters()
        # DeepSpeed takes input and label of a micro-batch from an iterator; ours are in the queue.
        self._placeholder = (torch.zeros(1, dtype=torch.int64), torch.zeros(1))

    def _step(
        self, batches: Sequence[Any], denominator: int, prefetch_next: Callable[[], object]
    ) -> StepResult:
        """See `Engine.step`."""
        count = len(batches)
        self._runner.queue, self._runner.prefetch_next = list(batches), prefetch_next
        # DeepSpeed averages over micro-batches and data-parallel ranks; the factor undoes that.
        self._runner.scale = self.topology.data_parallel_size * count / denominator
        loss = self.deepspeed.train_batch(iter([self._placeholder] * count))
        norm = self._reported_norm(loss.device)
        applied = self._count(self.deepspeed.was_step_applied())
        return StepResult(loss.detach().float(), norm, applied)

    def evaluate(self, batch: Any) -> Tensor:
        """See `Engine.evaluate`; the stages run one after the other."""
        topology = self.topology
        ranks = dist.get_process_group_ranks(topology.pp_group)
        was_training = self.module.training
        self.module.eval()
        carried: tuple[Tensor, ...] = ()
        with torch.no_grad():
            for stage, rank in enumerate(ranks):
                out: tuple[Tensor, ...] = ()
                if stage == topology.pp_rank:
                    given = {} if topology.is_first_stage else {"carried": carried}
                    result = self.module(batch, exact=True, **given)
                    out = result if isinstance(result, tuple) else (result,)
                carried = _broadcast(out, rank, topology.pp_group, self.deepspeed.device)
        self.module.train(was_training)
        return carried[0]

    def read(self, name: str, kind: Kind) -> Tensor:
        """See `Engine.read`; the stage that holds the parameter sends it to the others."""
        owner = self._owner[name]
        if owner == self.topology.pp_rank:
            whole = super().read(name, kind)
        else:
            device = self.deepspeed.device
            whole = torch.empty(self.shapes[name], dtype=torch.float32, device=device)
        source = dist.get_global_rank(self.topology.pp_group, owner)
        dist.broadcast(whole, source, group=self.topology.pp_group)
        return whole

    def _tied(self) -> list[nn.Parameter]:
        """Parameters that first and last stage share and this stage holds."""
        names = getattr(self.module, "tied_parameters", ())
        if not (self.topology.is_first_stage or self.topology.is_last_stage):
            return []
        return [self.parameters[name] for name in names]

    def _index_parameters(self) -> dict[str, int]:
        """Complete `shapes` to the whole model; returns the first stage of each parameter."""
        stages: list[dict[str, list[int]]] = [{}] * self.topology.pipeline_parallel_size
        dist.all_gather_object(stages, self.shapes, group=self.topology.pp_group)
        owner: dict[str, int] = {}
        for stage, shapes in enumerate(stages):
            for name, shape in shapes.items():
                owner.setdefault(name, stage)
                self.shapes[name] = shape
        self.shapes = {name: self.shapes[name] for name in owner}
        return owner


def _pipeline_module(runner: StageRunner, tied: list[nn.Parameter], topology: Topology) -> Any:
    """DeepSpeed's PipelineModule of one layer a stage; this rank holds that of its stage."""
    from deepspeed.pipe import PipelineModule
    from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

    group = _tied_group(topology)

    class Stages(PipelineModule):
        """Tied parameters by name: DeepSpeed can otherwise tie whole layers only."""

        def get_tied_weights_and_groups(self) -> list[tuple[nn.Parameter, Any]]:
            return [(parameter, group) for parameter in tied]

    layers = [
        runner if stage == topology.pp_rank else nn.Identity()
        for stage in range(topology.pipeline_parallel_size)
    ]
    grid = PipeModelDataParallelTopology(
        num_pp=topology.pipeline_parallel_size,
        num_mp=topology.tensor_parallel_size,
        num_dp=topology.data_parallel_size,
    )
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its partition
        module = Stages(layers, topology=grid, partition_method="uniform")
    for parameter in tied:
        # Counted once in the gradient norm.
        parameter.ds_pipe_replicated = not topology.is_first_stage  # type: ignore[attr-defined]
    return module


def _tied_group(topology: Topology) -> Any:
    """Process group of the first and last stage of this rank's pipeline; a collective of all."""
    pipelines: list[list[int]] = [[]] * topology.world_size
    dist.all_gather_object(pipelines, dist.get_process_group_ranks(topology.pp_group))
    found = None
    for ranks in sorted({(ranks[0], ranks[-1]) for ranks in pipelines}):
        group = dist.new_group(list(ranks))
        if topology.rank in ranks:
            found = group
    return found


def _check_ranks(grid: Any, topology: Topology) -> None:
    """Assert that DeepSpeed's grid and megatron's groups place every rank alike."""
    assert grid.get_data_parallel_rank() == topology.dp_rank
    assert grid.get_slice_parallel_rank() == topology.tp_rank
    assert grid.get_stage_id() == topology.pp_rank


def _broadcast(
    tensors: tuple[Tensor, ...], source: int, group: Any, device: torch.device
) -> tuple[Tensor, ...]:
    """Tensors of rank `source` on every rank of the group."""
    kinds: list[Any] = [[(tuple(t.shape), t.dtype) for t in tensors]]
    dist.broadcast_object_list(kinds, source, group=group)
    if dist.get_rank() != source:
        tensors = tuple(torch.empty(shape, dtype=dtype, device=device) for shape, dtype in kinds[0])
    tensors = tuple(t.contiguous() for t in tensors)
    for tensor in tensors:
        dist.broadcast(tensor, source, group=group)
    return tensors
