"""Sample with everything that is needed to draw it again."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Sample:
    """One generated sequence."""

    text: str
    """Decoded text, in which special tokens are visible."""
    tokens: list[int]
    sampler: str
    seed: int
    index: int
    """Number of the sample under this seed; its randomness is keyed by it, not by the batch."""
    network_evaluations: int
    """Forward passes spent on this sequence."""
    settings: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Sample as plain JSON."""
        return asdict(self)
