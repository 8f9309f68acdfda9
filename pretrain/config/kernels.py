"""Limits of the attention kernels that `model.attention` names: flash-attn and FlexAttention.

They are stated once, for a configuration that is checked before anything starts and for the call
of a kernel. Free of torch. What depends on the generation of a GPU and on installed packages stands
with the adapter (`pretrain.model.attention.flash`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from pretrain.config.run import Config

FLASH_HEADS, FLEX_HEADS = 256, 16
"""Largest head size of flash-attn, smallest of FlexAttention."""


class Obstacle(NamedTuple):
    """Reason why a kernel is unavailable, and the setting that would allow it."""

    problem: str
    """End of a sentence about the kernel."""
    remedy: str = ""
    """Setting and its value, after "set"; empty where only another kernel helps."""

    def __str__(self) -> str:
        return f"{self.problem}; set {self.remedy}" if self.remedy else self.problem


def flash_obstacle(on_gpu: bool, precision: str, head_size: int) -> Obstacle | None:
    """Reason why no version of flash-attn can be used, or None."""
    if not on_gpu:
        return Obstacle("it needs an NVIDIA GPU")
    if precision not in ("bfloat16", "float16"):
        return Obstacle(
            f"it computes in bfloat16 only, not in {precision}", "train.precision to bfloat16"
        )
    if head_size > FLASH_HEADS or head_size % 8:
        return Obstacle(
            f"its heads are a multiple of 8 and at most {FLASH_HEADS} wide, not {head_size} "
            "(model.hidden_size over model.num_attention_heads)",
            "model.num_attention_heads to another number",
        )
    return None


def flex_obstacle(on_gpu: bool, head_size: int, attention_dropout: float) -> Obstacle | None:
    """Reason why FlexAttention cannot train, or None."""
    if not on_gpu:
        return Obstacle("it has no backward pass on a CPU and needs an NVIDIA GPU")
    if attention_dropout > 0:
        return Obstacle(
            f"it cannot drop attention weights, but model.attention_dropout is {attention_dropout}",
            "model.attention_dropout to 0",
        )
    if head_size < FLEX_HEADS:
        return Obstacle(
            f"its heads are at least {FLEX_HEADS} wide, not {head_size} (model.hidden_size over "
            "model.num_attention_heads)",
            "model.num_attention_heads to a smaller number",
        )
    return None


def check_attention(config: Config, cpu_because: str | None) -> None:
    """Raise ValueError where `model.attention` names a kernel that cannot train.

    `cpu_because` says why the ranks are on a CPU; None where they are, or may be, on GPUs.
    """
    m, on_gpu = config.model, cpu_because is None
    if m.attention == "flash":
        found = flash_obstacle(on_gpu, config.train.precision, m.head_size)
    elif m.attention == "flex":
        found = flex_obstacle(on_gpu, m.head_size, m.attention_dropout)
    else:
        return
    if found is None:
        return
    where = "" if on_gpu else f", but {cpu_because}"
    remedies = filter(None, (found.remedy, "model.attention to auto"))
    raise ValueError(
        f"model.attention={m.attention} cannot be used: {found.problem}{where}; set "
        f"{', or '.join(remedies)}"
    )
