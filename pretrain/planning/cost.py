"""Transformer as numbers for the planner: weights, saved tensors and operations of its parts.

Everything here repeats `pretrain.model` as arithmetic. Tests compare it with the model itself:
weights with `parameter_count` and, to the byte, with engines; saved tensors with those that
autograd keeps.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod

from parallel.planner.costs import Loss, ModelCost, Part, Recompute, Saved, Weight
from pretrain.config.run import Config, ModelConfig
from pretrain.model.parametrization import NONE, multipliers
from pretrain.model.size import CONDITION, FREQUENCIES, stage_costs
from pretrain.objectives.network_size import AuxiliaryNetwork
from pretrain.study.flops import train_flops_per_token

_DECAYED, _KEPT, _SCALED = 0, 1, 2
"""The optimizer groups of `pretrain.training.parameter_groups`."""
CHUNK_BYTES, WHOLE_BYTES = 256 << 20, 1 << 30
"""Constants of `pretrain.model.chunked`, which cannot be imported without megatron-core."""


@dataclass(frozen=True)
class ObjectiveCost:
    """Properties of an objective that the planner needs."""

    causal: bool
    """True where attention is causal and its kernel skips the masked pairs."""
    dense_mask: bool
    """True where attention takes a mask of pairs, which every layer keeps."""
    positions_per_token: float
    head_share: float
    extra_passes: float = 0.0
    """Extra forward passes without gradient in a training step."""
    teacher: bool = False
    """True where it learns from a frozen copy of the model."""
    on_gpu: bool = True
    auxiliary: AuxiliaryNetwork | None = None
    """Network of the objective, in addition to the transformer."""


def model_cost(config: Config, padded_vocab_size: int, objective: ObjectiveCost) -> ModelCost:
    """Numbers of a configuration that depend neither on the layout nor on the micro-batch."""
    m, length = config.model, config.data.seq_length
    layer, head = stage_costs(m, padded_vocab_size, objective.head_share)
    d, groups, limits = m.head_size, m.query_groups, config.objective.layouts
    grouped = _Groups(m)
    return ModelCost(
        first=grouped.part(_first(m, padded_vocab_size, config, objective)),
        layer=grouped.part(_layer(m, length * objective.positions_per_token, objective)),
        num_layers=m.num_layers,
        last=grouped.part(_last(m, padded_vocab_size)),
        loss=Loss(
            vocabulary=padded_vocab_size,
            hidden_size=m.hidden_size,
            chunk=config.train.loss_chunk if objective.auxiliary is None else 0,
            whole_bytes=CHUNK_BYTES if objective.on_gpu else WHOLE_BYTES,
            chunk_bytes=CHUNK_BYTES,
        ),
        final=_final(m),
        layer_workspace=_layer_workspace(m),
        tied=grouped.weights(_embedding(m, padded_vocab_size, config.optimizer.decay_embeddings))
        if m.tie_embeddings
        else (),
        hidden_size=m.hidden_size,
        key_value_size=2 * groups * d,
        seq_length=length,
        positions_per_token=objective.positions_per_token,
        head_share=objective.head_share,
        flops_per_token=train_flops_per_token(
            m,
            padded_vocab_size,
            length,
            causal=objective.causal,
            head_share=objective.head_share,
            positions_per_token=objective.positions_per_token,
            extra_passes=objective.extra_passes,
        ),
        extra_passes=objective.extra_passes,
        teacher=objective.teacher,
        pipeline=limits.pipeline,
        context=limits.context and m.short_convolution == 0,
        sequence=m.short_convolution == 0,
        largest_zero_stage=limits.largest_zero_stage,
        stage_costs=(tuple(layer), head),
        tensor_parallel_sizes={
            "model.num_attention_heads": m.num_attention_heads,
            "model.ffn_hidden_size": m.ffn_size,
            "model.vocab_multiple": m.vocab_multiple,
        },
        key_value_heads=groups,
        vocabulary_elements=padded_vocab_size * m.hidden_size * (1 if m.tie_embeddings else 2),
    )


class _Groups:
    """Groups of the optimizer, divided where parameters have different multipliers."""

    def __init__(self, model: ModelConfig) -> None:
        self.model = model
        self.found = {(group, NONE): group for group in (_DECAYED, _KEPT, _SCALED)}

    def part(self, part: Part) -> Part:
        """Part with the groups of its weights."""
        return replace(part, weights=self.weights(part.weights))

    def weights(self, given: tuple[Weight, ...]) -> tuple[Weight, ...]:
        """Weights with their groups; a weight with a separate rate has no multipliers."""
        result = []
        for weight in given:
            of = NONE if weight.group == _SCALED else multipliers(weight.name, self.model)
            group = self.found.setdefault((weight.group, of), len(self.found))
            result.append(replace(weight, group=group))
        return tuple(result)


def _matrix(name: str, *shape: int, sharded: bool = True, group: int = _DECAYED) -> Weight:
    return Weight(prod(shape), sharded, group, f"model.{name}.weight", shape)


def _vector(name: str, size: int) -> Weight:
    """A norm or a bias."""
    return Weight(size, False, _KEPT, f"model.{name}", (size,))


def _embedding(m: ModelConfig, vocabulary: int, decayed: bool) -> tuple[Weight, ...]:
    group = _DECAYED if decayed else _KEPT
    return (_matrix("embedding", vocabulary, m.hidden_size, group=group),)


def _linear(name: str, inputs: int, outputs: int) -> tuple[Weight, Weight]:
    """A replicated linear layer with bias."""
    return _matrix(name, outputs, inputs, sharded=False), _vector(f"{name}.bias", outputs)


def _first(m: ModelConfig, vocabulary: int, config: Config, objective: ObjectiveCost) -> Part:
    weights = _embedding(m, vocabulary, config.optimizer.decay_embeddings)
    saved: tuple[Saved, ...] = (Saved(1, "whole", 8),)
    kernels = 6
    if m.time_conditioning:
        weights += _linear("noise_embedding.first", FREQUENCIES, CONDITION)
        weights += _linear("noise_embedding.second", CONDITION, CONDITION)
    if objective.auxiliary is not None:
        weights += _auxiliary_weights(objective.auxiliary)
        saved += _auxiliary_saved(objective.auxiliary, vocabulary, config.data.seq_length)
        kernels += 80
    return Part(weights, saved=saved, elementwise=3 * m.hidden_size, kernels=kernels)


def _auxiliary_weights(network: AuxiliaryNetwork) -> tuple[Weight, ...]:
    groups = {"decayed": _DECAYED, "kept": _KEPT, "scaled": _SCALED}
    return tuple(
        Weight(w.elements, w.over_vocabulary, groups[w.group], f"own.{w.name}", w.shape)
        for w in network.weights
    )


def _auxiliary_saved(network: AuxiliaryNetwork, vocabulary: int, length: int) -> tuple[Saved, ...]:
    """Tensors that the network saves; in bytes where its precision is not the compute precision."""
    return (
        Saved(network.position_bytes + network.sequence_bytes / length, "whole", 1),
        Saved(network.position_elements, "whole"),
        Saved(network.token_bytes * vocabulary, "tensor", 1, fixed=True),
        Saved(network.fixed_bytes, "whole", 1, fixed=True),
    )


def _layer(m: ModelConfig, length: float, objective: ObjectiveCost) -> Part:
    h, d, f = m.hidden_size, m.head_size, m.ffn_size
    width = m.num_attention_heads * d
    qkv = (m.num_attention_heads + 2 * m.query_groups) * d
    up = (2 if m.activation == "swiglu" else 1) * f
    weights = [
        _vector("layers.0.attention_norm.weight", h),
        _vector("layers.0.mlp_norm.weight", h),
        _matrix("layers.0.attention.qkv", qkv, h),
        _matrix("layers.0.attention.out", h, width),
        _matrix("layers.0.mlp.up", up, h),
        _matrix("layers.0.mlp.down", h, f),
    ]
    if m.qk_norm:
        weights += [_vector(f"layers.0.attention.{x}_norm.weight", d) for x in ("q", "k")]
    k = m.short_convolution
    if k > 0:
        parts = ("attention", "mlp")
        weights += [_matrix(f"layers.0.{x}_convolution", k, h, sharded=False) for x in parts]
    if m.time_conditioning:
        weights += _linear("layers.0.modulation.linear", CONDITION, 6 * h)
    saved, kept = _layer_saved(m, length, objective)
    visible = (length + 1) / 2 if objective.causal else length
    return Part(
        weights=tuple(weights),
        saved=saved,
        kept=kept,
        matrix_flops=2.0 * (h * qkv + width * h + h * up + f * h),
        attention_flops=4.0 * width * visible,
        # Norms, residual sums and activations between matrices, each read and written once.
        # Each weight of a convolution reads input and sum and writes the sum.
        elementwise=10 * h
        + 4 * qkv
        + 2 * up
        + f
        + (12 * h if m.time_conditioning else 0)
        + 6 * k * h,
        kernels=30 + (8 if m.qk_norm else 0) + (14 if m.time_conditioning else 0) + 2 * k,
    )


def _layer_saved(
    m: ModelConfig, length: float, objective: ObjectiveCost
) -> tuple[tuple[Saved, ...], dict[Recompute, tuple[Saved, ...]]]:
    """Tensors that a layer keeps in all, and those it keeps under each mode of recomputation."""
    h, d, f = m.hidden_size, m.head_size, m.ffn_size
    heads, groups = m.num_attention_heads, m.query_groups
    width, qkv = heads * d, (heads + 2 * groups) * d
    up = (2 if m.activation == "swiglu" else 1) * f
    kept = [
        Saved(2 * h, "sequence"),  # the residual stream in front of both norms
        Saved(2, "sequence", 4),  # their inverse norms
        Saved(qkv, "tensor", under="any" if m.qk_norm else "alone"),  # queries, keys and values
        Saved(qkv + width, "tensor", under="context"),  # exchanged, and the results
        Saved(width, "tensor"),  # output of attention
        Saved(heads, "tensor", 4),  # its log-sum-exp
        Saved(up, "tensor"),
    ]
    recomputed = [
        Saved(2 * h, "sequence"),  # normed inputs of both parts
        Saved((heads + groups) * d, "tensor", under="alone"),  # rotated queries and keys
        Saved(f, "tensor"),  # the activation
    ]
    if heads > groups > 1:
        recomputed.append(Saved(width, "tensor", under="alone"))  # queries outside their groups
    if m.qk_norm:
        recomputed.append(Saved(heads + groups, "tensor", 4))
    if m.short_convolution > 0:
        recomputed.append(Saved(2 * h, "sequence"))  # normed, before the convolutions
    if m.activation == "swiglu":
        recomputed.append(Saved(h * up, "tensor", fixed=True))  # gate and up rows, separated
    if objective.dense_mask:
        kept.append(Saved(length, "whole"))  # the mask that attention takes
    if m.time_conditioning:
        kept.append(Saved(2 * h, "sequence"))  # outputs of both parts, for their gates
        recomputed.append(Saved(2 * h, "sequence"))  # normed, before the modulation
    return (*kept, *recomputed), {"selective": tuple(kept), "full": (Saved(h, "sequence"),)}


def _layer_workspace(m: ModelConfig) -> tuple[Saved, ...]:
    """Gradients that exist while the MLP is differentiated: of its output and of its inside."""
    inside = (3 if m.activation == "swiglu" else 2) * m.ffn_size
    return (Saved(2 * m.hidden_size, "whole"), Saved(inside, "tensor"))


def _last(m: ModelConfig, vocabulary: int) -> Part:
    h = m.hidden_size
    weights = [_vector("head.norm.weight", h)]
    if m.time_conditioning:
        weights += _linear("head.modulation.linear", CONDITION, 2 * h)
    if not m.tie_embeddings:
        weights.append(_matrix("head.projection", vocabulary, h))
    return Part(
        weights=tuple(weights),
        saved=(
            Saved(h, "whole", gathered=True),
            Saved(4, "whole", 8),
        ),
        matrix_flops=2.0 * h * vocabulary,
        elementwise=6 * h + 8 * vocabulary,
        kernels=20,
    )


def _final(m: ModelConfig) -> tuple[Saved, ...]:
    """Tensors of the last norm, which acts on slices of the sequence."""
    kept = [Saved(m.hidden_size, "sequence"), Saved(1, "sequence", 4)]
    if m.time_conditioning:
        kept.append(Saved(m.hidden_size, "sequence"))
    return tuple(kept)
