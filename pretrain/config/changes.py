"""Changes of its configuration that a run may make when it goes on: resumed, or as a branch."""

from __future__ import annotations

from pretrain.config.compose import flatten
from pretrain.config.run import Config

MAY_CHANGE = (
    "run.name", "run.root", "run.dir", "run.device", "data.train", "data.validation",
    "data.tokenizer", "data.epochs", "data.verify", "data.cache", "data.cache_bytes",
    "model.attention", "optimizer.min_lr",
    "optimizer.schedule.", "parallel.", "train.", "evaluation.", "tracking.",
)  # fmt: skip
"""Keys and prefixes of keys that a run may change when it is resumed. Pools may move: their content
is compared instead of their path."""


def compare(old: Config, new: Config) -> list[str]:
    """List a line for each key that differs although a resumed run may not change it."""
    before, after = flatten(old), flatten(new)
    # Keys that only one of two components has are left out: the line of its `name` is enough.
    return [
        f"{key}: the run has {before[key]!r}, given {value!r}"
        for key, value in after.items()
        if key in before and before[key] != value and not may_change(key)
    ]


def may_change(key: str) -> bool:
    """True where a run that goes on may change this key."""
    return any(key == k or (k.endswith(".") and key.startswith(k)) for k in MAY_CHANGE)


def moved_data(old: Config, new: Config) -> list[str]:
    """List pools whose path and content changed; an old pool that is missing is not compared."""
    from data_pipeline.errors import DataError
    from data_pipeline.stream.open_stream import content_hash

    lines = []
    for key in ("train", "validation"):
        before, after = getattr(old.data, key), getattr(new.data, key)
        if before == after:
            continue
        try:
            same = content_hash(before) == content_hash(after)
        except DataError:
            continue
        if not same:
            lines.append(f"data.{key}: the run has {before}, given {after} (other content)")
    return lines
