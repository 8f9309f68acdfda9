"""Places in a run at which a step ends, and at which a checkpoint can be."""

from __future__ import annotations

import math
from collections.abc import Iterable


def position_at(epoch: float, sequences_per_epoch: int) -> int:
    """Last sample position at or before `epoch`; a millionth of a position is rounding."""
    return math.floor(round(epoch * sequences_per_epoch, 6))


def last_boundary(place: float, batch_size: int) -> int:
    """End of the last whole step at or before the position `place`; 0 where there is none."""
    return int(place // batch_size) * batch_size


def is_last_before(
    position: int, places: Iterable[int], *, batch_size: int, total_positions: int
) -> bool:
    """True where a step ends at `position` and the next one after one of these places."""
    following = min(position + batch_size, total_positions)
    if position >= total_positions:
        return total_positions in places
    return any(position <= place < following for place in places)
