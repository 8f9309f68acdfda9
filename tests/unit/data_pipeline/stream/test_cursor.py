"""The cursor is plain JSON and belongs to one stream."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.errors import CursorError
from data_pipeline.shards.pool import TokenPool
from data_pipeline.stream.budget import Budget
from data_pipeline.stream.cursor import Cursor
from data_pipeline.stream.stream import TokenStream

PoolMaker = Callable[..., tuple[Path, np.ndarray]]


def make_stream(manifest: Path, unique: int = 4321, **options: Any) -> TokenStream:
    pool = TokenPool(manifest)
    defaults = {"seed": 5, "epochs": 2.2}
    return TokenStream(pool, Budget(unique, 64, pool.num_tokens), **{**defaults, **options})


def test_cursor_is_plain_json_and_round_trips(make_pool: PoolMaker) -> None:
    cursor = Cursor.at(make_stream(make_pool()[0]), 96)
    assert Cursor.from_dict(cursor.to_dict()) == cursor
    assert all(type(value) in (int, str) for value in cursor.to_dict().values())
    with pytest.raises(CursorError, match=r"missing \['seed'\]"):
        Cursor.from_dict({k: v for k, v in cursor.to_dict().items() if k != "seed"})


def test_cursor_refuses_another_stream_naming_both_sides(make_pool: PoolMaker) -> None:
    manifest, _ = make_pool()
    cursor = Cursor.at(make_stream(manifest), 96)
    cursor.check(make_stream(manifest, epochs=9.5))
    with pytest.raises(CursorError) as caught:
        cursor.check(make_stream(manifest, unique=4000, seed=6, documents="masked"))
    message = str(caught.value)
    assert "seed: saved 5, now 6" in message
    assert "budget: saved 4321, now 4000" in message
    assert "documents: saved packed, now masked" in message
    assert "manifest" not in message
    assert caught.value.exit_code == 4
    other, _ = make_pool(seed=1, name="other")
    with pytest.raises(CursorError, match="manifest: saved"):
        cursor.check(make_stream(other))
