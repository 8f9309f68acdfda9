"""Trunk and branches of a study: exact places, legal configurations, cost."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from data_pipeline.stream.budget import total_positions
from pretrain.config.compose import compose, replace_values
from pretrain.config.optimizers import AdamWConfig
from pretrain.errors import ConfigError
from pretrain.study.runner.branches import Branches, Parts, split
from pretrain.training.boundaries import is_last_before, position_at
from pretrain.training.learning_rate import learning_rate

LENGTHS = Branches(epochs=(8, 1, 2, 4), decay=0.2)


def parts_of(branches: Branches, sequences: int, batch: int, warmup: float = 3) -> Parts:
    return split(branches, sequences_per_epoch=sequences, batch_size=batch, warmup=warmup)


def test_cost_of_doubled_lengths() -> None:
    """6.4 epochs of trunk and a fifth of each of 15 epochs, instead of 15."""
    parts = parts_of(LENGTHS, 1000, 8)
    assert [part.name for part in parts.all] == ["trunk", "e1", "e2", "e4", "e8"]
    assert sum(part.stop - part.start for part in parts.all) == 9400
    assert sum(part.stop for part in parts.branches) == 15000
    assert [part.origin_step for part in parts.branches] == [100, 200, 400, 800]
    assert parts.trunk is not None
    assert parts.trunk.overrides["data.epochs"] == 6.4
    assert parts.trunk.overrides["train.checkpoint_epochs"] == [0.8, 1.6, 3.2, 6.4]


@pytest.mark.parametrize("sequences", [47, 782, 1000])
@pytest.mark.parametrize("batch", [1, 7, 16])
@pytest.mark.parametrize("decay", [0.1, 0.25, 1 / 3])
def test_the_trunk_saves_at_the_last_step_that_every_length_shares(
    sequences: int, batch: int, decay: float
) -> None:
    """Played step by step: its rates are those of each separate run up to there, and no further."""
    parts = parts_of(Branches(epochs=(1, 1.7, 2.5, 6), decay=decay), sequences, batch, 1)
    assert parts.trunk is not None
    values = dict(parts.trunk.overrides)
    assert total_positions(sequences, values["data.epochs"]) == parts.trunk.stop
    places = [position_at(epoch, sequences) for epoch in values["train.checkpoint_epochs"]]
    saved = [
        end
        for end in range(batch, parts.trunk.stop + 1, batch)
        if is_last_before(end, places, batch_size=batch, total_positions=parts.trunk.stop)
    ]
    assert saved == sorted({part.start for part in parts.branches})
    schedule = {"name": "wsd", "warmup": 1, "decay": decay}
    wsd = AdamWConfig.model_validate({"lr": 1.0, "schedule": schedule})
    for part in parts.branches:
        rates = [
            learning_rate(wsd, position=end, total_positions=part.stop, warmup=batch)
            for end in (part.start, min(part.start + batch, part.stop))
        ]
        assert rates[0] == 1.0 > rates[1]
        assert part.origin_step == part.start / batch


def test_lengths_without_a_step_to_share_start_afresh() -> None:
    """In one step of 100 sequences nothing is left to share."""
    alone = parts_of(Branches(epochs=(1,)), 100, 100, warmup=0)
    assert alone.trunk is None
    assert [part.start for part in alone.all] == [0]
    assert alone.branches[0].values(Path("trunk")) == alone.branches[0].overrides
    assert alone.branches[0].is_ready(Path("trunk"))
    mixed = parts_of(Branches(epochs=(1, 4)), 100, 100, warmup=0)
    assert [part.origin_step for part in mixed.branches] == [None, 3]


def test_a_branch_is_ready_once_its_checkpoint_is_complete(tmp_path: Path) -> None:
    branch = parts_of(LENGTHS, 1000, 8).branches[1]
    origin = tmp_path / "checkpoints" / "step-00000200"
    assert branch.values(tmp_path)["run.branch_from"] == str(origin)
    assert not branch.is_ready(tmp_path)
    origin.mkdir(parents=True)
    assert not branch.is_ready(tmp_path)
    (origin / "manifest.json").touch()
    assert branch.is_ready(tmp_path)


def test_every_part_is_a_legal_configuration() -> None:
    config = compose(["model=tiny", "optimizer.schedule.warmup=3"])
    for part in parts_of(LENGTHS, 1000, 8).all:
        made = replace_values(config, part.values(Path("/trunk")))
        assert made.optimizer.schedule.warmup == 3
        assert made.optimizer.schedule.name == ("constant" if part.is_trunk else "wsd")


def test_a_warm_up_that_differs_between_the_lengths_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"warmup 0\.02 is a share .* e\.g\. 2 \(that share"):
        parts_of(LENGTHS, 1000, 8, warmup=0.02)
    with pytest.raises(ConfigError, match=r"warmup 126 steps .* shortest of `branches`, 125 steps"):
        parts_of(LENGTHS, 1000, 8, warmup=126)


@pytest.mark.parametrize(
    "values", [{"epochs": []}, {"epochs": [1, 1]}, {"epochs": [0]}, {"epochs": [1], "decay": 1.0}]
)
def test_branches_that_mean_nothing_are_refused(values: dict) -> None:
    with pytest.raises(ValidationError):
        Branches.model_validate(values)
