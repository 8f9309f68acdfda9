"""The state in a checkpoint is checked before it is used, with the place of what is wrong."""

from __future__ import annotations

from typing import Any

import pytest

from data_pipeline.errors import CursorError
from data_pipeline.stream.cursor import Cursor
from pretrain.training.state import TrainState

CURSOR: dict[str, Any] = {
    "position": 16, "order_version": 1, "order": "global", "seed": 17, "manifest": "a",
    "tokenizer": "b", "budget": 1500, "seq_length": 32, "documents": "packed",
}  # fmt: skip
WRONG = [None, [], "3", 1.5, True, -1, float("nan"), {}]


@pytest.mark.parametrize("value", WRONG, ids=str)
def test_progress_of_a_wrong_type_is_refused_with_its_name(value: Any) -> None:
    with pytest.raises(ValueError, match=r"train\.step: "):
        TrainState.from_dict({"step": value, "position": 8})
    with pytest.raises(ValueError, match=r"train\.flops: "):
        TrainState.from_dict({"flops": float("inf") if value == 1.5 else value})


def test_progress_with_unknown_fields_or_none_is_refused() -> None:
    with pytest.raises(ValueError, match=r"train\.momentum: unknown"):
        TrainState.from_dict({"momentum": 1})
    with pytest.raises(ValueError, match="train: list instead of an object"):
        TrainState.from_dict([])
    state = TrainState(step=3, position=24, tokens=768, flops=1e9, evaluation_due=True)
    assert TrainState.from_dict(state.to_dict()) == state


@pytest.mark.parametrize("key", CURSOR)
@pytest.mark.parametrize("value", WRONG, ids=str)
def test_cursors_of_a_wrong_type_are_refused_with_its_name(key: str, value: Any) -> None:
    if type(value) is type(CURSOR[key]) and key != "position":
        return  # another value of the right type is compared with the stream later
    with pytest.raises(CursorError, match=f"not a data cursor: {key} is malformed"):
        Cursor.from_dict({**CURSOR, key: value})
    with pytest.raises(CursorError, match="instead of an object"):
        Cursor.from_dict(value if value != {} else None)


def test_evaluations_without_improvement_are_counted_from_the_latest_one_that_counts() -> None:
    state = TrainState()
    lowest = []
    for step, loss in enumerate([5.0, 4.0, 3.95, 3.92, float("nan"), 3.85, 4.2], start=1):
        state.step = step
        lowest.append(state.note_evaluation(loss, 0.1))
        if step == 5:
            assert (state.evaluations_without_improvement, state.reference_loss) == (3, 4.0)
    assert lowest == [True, True, True, True, False, True, False]
    assert (state.lowest_loss, state.lowest_step) == (3.85, 6)
    assert (state.evaluations_without_improvement, state.reference_loss) == (1, 3.85)
    assert TrainState.from_dict(state.to_dict()) == state


def test_an_equal_loss_is_no_improvement_and_a_negative_one_may_be() -> None:
    state = TrainState(step=1)
    assert state.note_evaluation(0.0, 0.0)
    state.step = 2
    assert not state.note_evaluation(0.0, 0.0)
    assert state.note_evaluation(-0.5, 0.0)
    assert TrainState.from_dict(state.to_dict()) == state


def test_state_of_an_earlier_version_has_seen_no_evaluation() -> None:
    state = TrainState.from_dict({"step": 3, "position": 24, "tokens": 768, "flops": 1e9})
    assert (state.lowest_step, state.evaluations_without_improvement) == (0, 0)
