"""Whole estimate for one way to run a step, and the search for the best ones.

Every candidate goes through `parallel.layout.rules`, so that nothing is recommended that would be
refused at launch. Those that do not fit are kept with the memory they lack.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache

from parallel.engine.optimizer import OptimizerSpec, check_optimizer
from parallel.errors import LayoutError
from parallel.layout.rules import Layout, check_layout, check_rules, divisors, split_batch
from parallel.layout.stages import split_layers
from parallel.planner.candidate import Candidate
from parallel.planner.costs import ModelCost, Offload, Recompute
from parallel.planner.machine import Machine
from parallel.planner.memory import MemoryPlan, StageParts, stage_memory
from parallel.planner.timing import StepTime, step_time

SECONDS_PER_DAY = 86_400
INDISTINCT = 0.03
"""Relative difference of times that means nothing."""
TIGHT = 0.05
"""Share of a GPU's memory that should be left, as the estimate of activations may err by this."""
RECOMPUTE: tuple[Recompute, ...] = ("none", "selective", "full")


@dataclass(frozen=True)
class Plan:
    """Memory and time of one candidate on a machine."""

    candidate: Candidate
    machine: Machine
    memory: MemoryPlan
    """Memory of the stage that needs most."""
    stage: int
    """Index of that stage."""
    layers: tuple[int, ...]
    """Layers of every stage."""
    time: StepTime
    tokens_per_step: int
    flops_per_token: float

    @property
    def fits(self) -> bool:
        """True if every rank has the memory, and every node the host memory."""
        return self.lacking <= 0 and self.host_bytes <= self.machine.usable_host_bytes

    @property
    def lacking(self) -> float:
        """Bytes that the worst rank needs beyond what its GPU has; negative to spare."""
        return self.memory.total - self.machine.usable_bytes

    @property
    def tight(self) -> bool:
        """True if it fits with less to spare than the error of an estimate."""
        return self.fits and -self.lacking < TIGHT * self.machine.usable_bytes

    @property
    def host_bytes(self) -> float:
        """Bytes that are offloaded into the memory of a node."""
        ranks = min(self.machine.gpus_per_node, self.candidate.layout.world_size)
        return ranks * self.memory.state.host

    @property
    def tokens_per_second(self) -> float:
        """Over all GPUs."""
        return self.tokens_per_step / self.time.total

    @property
    def tokens_per_day(self) -> float:
        """Over all GPUs."""
        return self.tokens_per_second * SECONDS_PER_DAY

    @property
    def mfu(self) -> float:
        """Useful operations over those of the dense rate (model FLOPs utilisation)."""
        gpus = self.candidate.layout.world_size
        peak = self.machine.flops(self.candidate.precision) * gpus
        return self.flops_per_token * self.tokens_per_second / peak

    def days(self, tokens: float) -> float:
        """Days to train on `tokens`."""
        return tokens / self.tokens_per_day

    def gpu_hours(self, tokens: float) -> float:
        """GPU-hours to train on `tokens`."""
        return 24 * self.days(tokens) * self.candidate.layout.world_size


def stages_of(model: ModelCost, candidate: Candidate) -> list[StageParts]:
    """Stages as the engine splits the layers."""
    pp = candidate.layout.pipeline_parallel_size
    layers, head = model.stage_costs
    split = _split(layers, pp, head)
    return [StageParts(model, i == 0, i == pp - 1, len(held)) for i, held in enumerate(split)]


def estimate_stages(
    model: ModelCost, candidate: Candidate, stages: list[StageParts] | None = None
) -> list[MemoryPlan]:
    """Memory of a rank of every stage; `stages` are those of the model, where they are known."""
    stages = stages or stages_of(model, candidate)
    behind = len(stages) - 1
    return [stage_memory(model, candidate, stage, behind - i) for i, stage in enumerate(stages)]


def estimate(
    model: ModelCost,
    candidate: Candidate,
    machine: Machine,
    stages: list[StageParts] | None = None,
) -> Plan:
    """Memory and time of a candidate, which must be legal; `stages` as in `estimate_stages`."""
    stages = stages or stages_of(model, candidate)
    memories = estimate_stages(model, candidate, stages)
    worst = max(range(len(stages)), key=lambda i: memories[i].total)
    return Plan(
        candidate=candidate,
        machine=machine,
        memory=memories[worst],
        stage=worst,
        layers=tuple(stage.num_layers for stage in stages),
        time=step_time(model, candidate, machine, stages),
        tokens_per_step=candidate.global_batch_size * model.seq_length,
        flops_per_token=model.flops_per_token,
    )


@lru_cache(maxsize=256)
def _split(layers: tuple[float, ...], stages: int, head: float) -> tuple[range, ...]:
    return tuple(split_layers(layers, stages, last_cost=head))


@dataclass(frozen=True)
class Space:
    """Space of the search: what is given, the rest is varied."""

    num_gpus: int
    global_batch_size: int
    precision: str
    optimizer: OptimizerSpec
    averages: int = 0
    offload: Offload = "none"
    largest_micro_batch: int = 64


@dataclass(frozen=True)
class Search:
    """Result of the search."""

    fitting: tuple[Plan, ...]
    """Best first."""
    too_large: tuple[Plan, ...]
    """Those that lack memory, least first."""
    refused: dict[str, int]
    """Reasons for which degrees are illegal for this model, and the number of layouts of each."""


def search(model: ModelCost, machine: Machine, space: Space) -> Search:
    """Every legal layout on these GPUs, estimated and ranked by time."""
    refused: dict[str, int] = {}
    plans = []
    known: dict[int, list[StageParts]] = {}  # by pipeline degree: they remember what they hold
    for candidate in _candidates(model, machine, space, refused):
        degree = candidate.layout.pipeline_parallel_size
        if degree not in known:
            known[degree] = stages_of(model, candidate)
        plans.append(estimate(model, candidate, machine, known[degree]))
    fitting = sorted((p for p in plans if p.fits), key=lambda p: p.time.total)
    # Among times that the model cannot tell apart the simplest comes first.
    level = [p for p in fitting if p.time.total <= (1 + INDISTINCT) * fitting[0].time.total]
    level.sort(key=_complexity)
    fitting = level + fitting[len(level) :]
    too_large = sorted((p for p in plans if not p.fits), key=lambda p: p.memory.total)
    return Search(tuple(fitting), tuple(too_large), refused)


def _complexity(plan: Plan) -> tuple[float, ...]:
    """Sort key: memory to spare, few model ranks, a low ZeRO stage, no recomputation; memory."""
    c, layout = plan.candidate, plan.candidate.layout
    model_ranks = layout.world_size // layout.data_parallel_size
    order = RECOMPUTE.index(c.recompute)
    return plan.tight, model_ranks, c.zero_stage, order, plan.memory.total


def _candidates(
    model: ModelCost, machine: Machine, space: Space, refused: dict[str, int]
) -> Iterator[Candidate]:
    for tp, pp, cp in _degrees(model, machine, space):
        for zero in _legal_stages(tp, pp, cp, space):
            if zero > model.largest_zero_stage:
                continue
            try:
                layout = check_layout(
                    world_size=space.num_gpus,
                    tensor_parallel_size=tp,
                    pipeline_parallel_size=pp,
                    context_parallel_size=cp,
                    sequence_parallel=tp > 1 and cp == 1 and model.sequence,
                    zero_stage=zero,
                    precision=space.precision,
                    sizes=model.tensor_parallel_sizes,
                    num_query_groups=model.key_value_heads,
                    num_layers=model.num_layers,
                    seq_length=model.seq_length,
                )
                split_batch(space.global_batch_size, None, layout.data_parallel_size)
            except LayoutError as error:
                refused[str(error)] = refused.get(str(error), 0) + 1
                continue
            per_rank = space.global_batch_size // layout.data_parallel_size
            for micro in divisors(per_rank, space.largest_micro_batch):
                for recompute in RECOMPUTE:
                    yield Candidate(
                        layout=layout,
                        zero_stage=zero,
                        micro_batch_size=micro,
                        num_microbatches=per_rank // micro,
                        optimizer=space.optimizer,
                        precision=space.precision,
                        recompute=recompute,
                        averages=space.averages,
                        offload=space.offload,
                    )


def _degrees(model: ModelCost, machine: Machine, space: Space) -> Iterator[tuple[int, int, int]]:
    """Degrees whose product divides the GPUs; tensor parallelism stays inside a node."""
    gpus = space.num_gpus
    for tp in divisors(gpus, machine.gpus_per_node):
        for pp in divisors(gpus // tp, model.num_layers if model.pipeline else 1):
            largest = machine.gpus_per_node // tp if model.context and pp == 1 else 1
            for cp in divisors(gpus // tp // pp, largest):
                yield tp, pp, cp


def _legal_stages(tp: int, pp: int, cp: int, space: Space) -> list[int]:
    """ZeRO stages that the general rules allow; their refusals do not concern the model."""
    layout = Layout(tp, pp, cp, space.num_gpus // (tp * pp * cp))
    legal = []
    for zero in (0, 1, 2, 3):
        with suppress(LayoutError):
            check_rules(layout, zero, space.precision, space.offload)
            check_optimizer(space.optimizer, layout, zero, space.precision, space.offload)
            legal.append(zero)
    return legal
