"""Keys that stand twice in a JSON object, of which readers take the last without a word."""

from __future__ import annotations

from collections import Counter
from typing import Any


def refuse_repeats(pairs: list[tuple[str, Any]]) -> None:
    """Raise ValueError for an object with a key twice: an `object_pairs_hook` that builds none."""
    if len(dict(pairs)) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        raise ValueError(f"the key {counts.most_common(1)[0][0]!r} stands twice")
