"""A small transformer on megatron's layers, its unsharded twin in plain torch, and random data.

The twin shares nothing with the package: full matrices, torch's AdamW and clip_grad_norm_, one
process. Weights are a function of their name alone, so that every layout starts alike.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parallel.engine.base import Engine, EngineConfig, StepResult
from parallel.engine.build import build_engine
from parallel.engine.optimizer import OptimizerSpec, StateTensor
from parallel.layers import mark_parallel_layers, parallel_config, partition_dim, sum_gradient
from parallel.layout.topology import Topology

VOCABULARY, WIDTH, HEADS, LAYERS, LENGTH, GLOBAL_BATCH = 64, 32, 4, 2, 12, 8
SHAPES = {"embedding.weight": (VOCABULARY, WIDTH), "norm.weight": (WIDTH,)}
SHAPES |= {"head.weight": (VOCABULARY, WIDTH), "head.bias": (VOCABULARY,)}
for _i in range(LAYERS):
    SHAPES |= {
        f"blocks.{_i}.norm.weight": (WIDTH,),
        f"blocks.{_i}.qkv.weight": (3 * WIDTH, WIDTH),
        f"blocks.{_i}.query_norm.weight": (WIDTH // HEADS,),
        f"blocks.{_i}.out.weight": (WIDTH, WIDTH),
        f"blocks.{_i}.out.bias": (WIDTH,),
    }


def full_weights() -> dict[str, Tensor]:
    """Initial weights of the whole model."""
    weights = {}
    for name, shape in SHAPES.items():
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        offset = 1.0 if "norm" in name else 0.0
        weights[name] = offset + 0.08 * torch.randn(shape, generator=generator)
    return weights


def global_batch(step: int) -> dict[str, Tensor]:
    """Tokens, targets and positive weights of one global batch, by step."""
    g = torch.Generator().manual_seed(1000 + step)
    ids = torch.randint(0, VOCABULARY, (GLOBAL_BATCH, LENGTH), generator=g)
    weight = torch.rand(GLOBAL_BATCH, LENGTH, generator=g) * 3
    return {"ids": ids, "targets": (ids * 5 + 3) % VOCABULARY, "weight": weight}


class RMSNorm(nn.Module):
    """Replicated weight; `partial` where a rank applies it to a part of the work only."""

    def __init__(self, width: int, topology: Topology, partial: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.topology, self.partial = topology, partial

    def forward(self, x: Tensor) -> Tensor:
        weight = sum_gradient(self.weight, self.topology) if self.partial else self.weight
        return F.rms_norm(x, x.shape[-1:], weight, 1e-5)


class Block(nn.Module):
    def __init__(self, config: Any, topology: Topology) -> None:
        super().__init__()
        from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

        self.heads = HEADS // topology.tensor_parallel_size
        self.norm = RMSNorm(WIDTH, topology, partial=config.sequence_parallel)
        common = {"config": config, "init_method": None, "skip_bias_add": False}
        # A bias of the keys would have a gradient of zero, of which Adam sees the rounding only.
        self.qkv = ColumnParallelLinear(WIDTH, 3 * WIDTH, gather_output=False, bias=False, **common)
        self.query_norm = RMSNorm(WIDTH // HEADS, topology, partial=True)
        self.out = RowParallelLinear(WIDTH, WIDTH, input_is_parallel=True, bias=True, **common)

    def forward(self, x: Tensor) -> Tensor:  # [s, b, h]
        y = self.qkv(self.norm(x))[0]
        s, b, _ = y.shape
        q, k, v = y.view(s, b, self.heads, 3, -1).permute(3, 1, 2, 0, 4)
        y = F.scaled_dot_product_attention(self.query_norm(q), k, v)
        return x + self.out(y.permute(2, 0, 1, 3).reshape(s, b, -1))[0]


class ToyModel(nn.Module):
    """`toy(batch)` is the loss sum of the batch, `toy(batch, exact=True)` float64 [b]."""

    def __init__(self, topology: Topology) -> None:
        super().__init__()
        from megatron.core.tensor_parallel import ColumnParallelLinear, VocabParallelEmbedding

        config = parallel_config(topology)
        self.embedding = VocabParallelEmbedding(VOCABULARY, WIDTH, init_method=None, config=config)
        tp = topology.tensor_parallel_size
        self.blocks = nn.ModuleList(Block(config, topology) for _ in range(LAYERS))
        self.norm = RMSNorm(WIDTH, topology, partial=config.sequence_parallel)
        self.head = ColumnParallelLinear(
            WIDTH, VOCABULARY, config=config, init_method=None, bias=True, gather_output=False
        )
        mark_parallel_layers(self)
        for name, full in full_weights().items():
            parameter = self.get_parameter(name)
            dim = partition_dim(parameter)
            own = full if dim is None else full.chunk(tp, dim)[topology.tp_rank]
            parameter.data.copy_(own)

    def forward(self, batch: dict[str, Tensor], exact: bool = False) -> Tensor:
        from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

        h = self.embedding(batch["ids"]).transpose(0, 1).contiguous()
        for block in self.blocks:
            h = block(h)
        logits = self.head(self.norm(h))[0].float()
        loss = vocab_parallel_cross_entropy(logits, batch["targets"].t().contiguous()).t()
        if exact:
            return loss.double().sum(1)
        return (loss * batch["weight"]).sum()


def reference_loss(w: dict[str, Tensor], batch: dict[str, Tensor]) -> Tensor:
    """Token losses [b, s] of the unsharded twin."""
    h = F.embedding(batch["ids"], w["embedding.weight"])
    b, s, _ = h.shape
    for i in range(LAYERS):
        p = {k.split(".", 2)[2]: v for k, v in w.items() if k.startswith(f"blocks.{i}.")}
        y = F.linear(F.rms_norm(h, (WIDTH,), p["norm.weight"], 1e-5), p["qkv.weight"])
        q, k, v = y.view(b, s, HEADS, 3, -1).permute(3, 0, 2, 1, 4)
        q = F.rms_norm(q, q.shape[-1:], p["query_norm.weight"], 1e-5)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, s, -1)
        h = h + F.linear(y, p["out.weight"], p["out.bias"])
    h = F.rms_norm(h, (WIDTH,), w["norm.weight"], 1e-5)
    logits = F.linear(h, w["head.weight"], w["head.bias"])
    return F.cross_entropy(logits.transpose(1, 2), batch["targets"], reduction="none")


CLIP, DECAY = 0.4, 0.1


def denominator() -> int:
    return GLOBAL_BATCH * LENGTH


def learning_rate(step: int) -> float:
    return 1e-2 / (1 + step)


def reference_run(steps: int) -> tuple[list[float], list[float], dict[str, Tensor], Tensor]:
    """Losses, gradient norms, final weights and evaluation of the twin."""
    weights = {k: v.requires_grad_() for k, v in full_weights().items()}
    matrices = [v for v in weights.values() if v.dim() > 1]
    vectors = [v for v in weights.values() if v.dim() == 1]
    groups = [{"params": matrices, "weight_decay": DECAY}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
    losses, norms = [], []
    for step in range(steps):
        for index, group in enumerate(optimizer.param_groups):
            group["lr"] = learning_rate(step) * (0.5 if index == 0 else 1.0)
        batch = global_batch(step)
        loss = (reference_loss(weights, batch) * batch["weight"]).sum() / denominator()
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(nn.utils.clip_grad_norm_(weights.values(), CLIP)))
        optimizer.step()
        losses.append(float(loss))
    with torch.no_grad():
        bound = reference_loss(weights, global_batch(99)).double().sum(1)
    return losses, norms, {k: v.detach() for k, v in weights.items()}, bound


def _fused_adamw(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), eps=1e-8, fused=True)


ADAMW = OptimizerSpec("adamw", (StateTensor("exp_avg"), StateTensor("exp_avg_sq")), _fused_adamw)


def toy_engine(topology: Topology, zero_stage: int, **changes: Any) -> Engine:
    """The toy model in an engine, decay groups and clipping as in `reference_run`."""
    settings: dict[str, Any] = {
        "zero_stage": zero_stage,
        "precision": "float32",
        "num_microbatches": 2,
        "clip_grad_norm": CLIP,
        "optimizer": ADAMW,
    } | changes
    settings["micro_batch_size"] = (
        GLOBAL_BATCH // topology.data_parallel_size // settings["num_microbatches"]
    )
    model = ToyModel(topology)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [
        {"params": matrices, "weight_decay": DECAY, "lr_scale": 0.5},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return build_engine(model, groups, EngineConfig(**settings), topology)


def micro_batches(engine: Engine, step: int) -> Iterator[dict[str, Tensor]]:
    """This rank's share of the global batch of `step`, split into micro-batches."""
    config, topology = engine.config, engine.topology
    rows = torch.arange(GLOBAL_BATCH).view(
        config.num_microbatches, topology.data_parallel_size, config.micro_batch_size
    )
    for own in rows[:, topology.dp_rank]:
        yield {k: v[own] for k, v in global_batch(step).items()}


def toy_step(engine: Engine, step: int) -> StepResult:
    """One optimizer step on the data of `step`."""
    return engine.step(list(micro_batches(engine, step)), denominator(), learning_rate(step))
