"""First start of a branch: what fits is chosen and recorded, what does not is refused by name."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from parallel.checkpoint.manifest import FORMAT
from parallel.errors import CheckpointError
from pretrain.config.compose import compose, flatten, load_config, save_config
from pretrain.config.preflight import preflight
from pretrain.config.run import Config
from pretrain.errors import ConfigError
from pretrain.training.start import write_run

DECAY = ("optimizer.schedule.name=wsd", "optimizer.schedule.decay=0.2")


def configuration(pool: Path, tmp_path: Path, name: str, *overrides: str) -> Config:
    return compose(
        ["model=tiny", f"run.name={name}", f"run.root={tmp_path}", "tracking=jsonl",
         f"data.train={pool}/train/manifest.json", f"data.tokenizer={pool}/tokenizer.model",
         f"data.validation={pool}/validation/manifest.json", "data.seq_length=64",
         "data.unique_tokens=6400", "train.global_batch_size=8", "optimizer.schedule.warmup=2",
         *overrides]
    )  # fmt: skip


def checkpoint(config: Config, position: int, **changes: Any) -> Path:
    """Manifest that a run of this configuration writes at a position, without its tensors."""
    step = position // 8
    folder = config.run.path / "checkpoints" / f"step-{step:08d}"
    state = {
        "train": {"step": step, "position": position, "tokens": 64 * position, "flops": 1.0},
        "cursor": {},
        "config": flatten(config),
        "schedule": {"warmup_positions": 16.0},
    }
    manifest = {
        "format": FORMAT, "step": step, "optimizer_step": step, "layout": {}, "zero_stage": 0,
        "precision": "float32", "shapes": {}, "tensors": {}, "files": {}, "state": state,
    } | changes  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


@pytest.fixture
def trunk(pool: Path, tmp_path: Path) -> Config:
    """A run at constant rate with checkpoints at 0.8, 1.6 and 2 epochs."""
    config = preflight(
        configuration(pool, tmp_path, "trunk", "optimizer.schedule.name=constant", "data.epochs=2")
    )
    save_config(config, config.run.path / "config.yaml")
    for position in (80, 160, 200):
        checkpoint(config, position)
    return config


def branch(pool: Path, trunk: Config, *overrides: str) -> Config:
    """First start of a branch, by default of one epoch."""
    origin = () if any("run.branch_from" in o for o in overrides) else (
        f"run.branch_from={trunk.run.path}",
    )  # fmt: skip
    return preflight(
        configuration(pool, trunk.run.path.parent, "branch", *DECAY, *origin, *overrides)
    )


@pytest.mark.parametrize(("epochs", "position"), [(1, 80), (1.5, 80), (2, 160), (3, 200), (9, 200)])
def test_the_newest_checkpoint_before_the_decay_is_chosen_and_recorded(
    pool: Path, trunk: Config, epochs: float, position: int
) -> None:
    config = branch(pool, trunk, f"data.epochs={epochs}")
    chosen = trunk.run.path / "checkpoints" / f"step-{position // 8:08d}"
    assert config.run.branch_from == chosen
    manifest = (chosen / "manifest.json").read_bytes()
    assert config.run.branch_sha256 == hashlib.sha256(manifest).hexdigest()
    assert config.objective.time_window == trunk.objective.time_window == 8


def test_a_checkpoint_can_be_named(pool: Path, trunk: Config) -> None:
    chosen = trunk.run.path / "checkpoints" / "step-00000010"
    config = branch(pool, trunk, "data.epochs=3", f"run.branch_from={chosen}")
    assert config.run.branch_from == chosen


@pytest.mark.parametrize(
    "change",
    ["data.epochs=4", "train.global_batch_size=16", "train.stop_step=30", "parallel.zero_stage=0",
     "optimizer.schedule.name=cosine", "optimizer.schedule.decay=0.1", "optimizer.min_lr=1e-5",
     "train.precision=bfloat16", "evaluation.draws=3", "data.verify=size"],
)  # fmt: skip
def test_a_branch_may_change_what_a_resumed_run_may(pool: Path, trunk: Config, change: str) -> None:
    assert branch(pool, trunk, "data.epochs=3", change).run.branch_from is not None


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ("run.seed=18", "run.seed: the run has 17, given 18"),
        ("model.num_layers=5", "model.num_layers: the run has 4, given 5"),
        ("objective=masked", "objective.name: the run has 'autoregressive', given 'masked'"),
        ("data.unique_tokens=5000", "data.unique_tokens: the run has 6400, given 5000"),
        ("data.seq_length=32", "data.seq_length: the run has 64, given 32"),
        ("optimizer.weight_decay=1", "optimizer.weight_decay: the run has 0.1, given 1.0"),
        ("objective.time_window=4", "objective.time_window: the run has 8, given 4"),
    ],
)
def test_a_branch_may_not_change_what_it_computes(
    pool: Path, trunk: Config, change: str, line: str
) -> None:
    with pytest.raises(ConfigError, match="holds checkpoints of another configuration") as caught:
        branch(pool, trunk, "data.epochs=2", change)
    assert [text.strip() for text in str(caught.value).splitlines()][1:-1] == [line]


def test_a_decay_that_starts_before_every_checkpoint(pool: Path, trunk: Config) -> None:
    with pytest.raises(ConfigError, match=r"starts at position 72, epoch 0\.72, but .* 80, epoch"):
        branch(pool, trunk, "data.epochs=0.9")
    late = trunk.run.path / "checkpoints" / "step-00000020"
    with pytest.raises(ConfigError, match=r"but the checkpoint there .* 160, epoch 1\.6"):
        branch(pool, trunk, f"run.branch_from={late}")


def test_a_run_that_ends_before_its_origin(pool: Path, trunk: Config) -> None:
    late = trunk.run.path / "checkpoints" / "step-00000020"
    with pytest.raises(ConfigError, match=r"the run ends at position 160, .* at position 160,"):
        branch(pool, trunk, f"run.branch_from={late}", "optimizer.schedule.name=constant",
               "data.epochs=1.6")  # fmt: skip


@pytest.mark.parametrize("missing", ["nowhere", "empty"])
def test_a_place_without_checkpoints(pool: Path, trunk: Config, missing: str) -> None:
    place = trunk.run.path.parent / missing
    (trunk.run.path.parent / "empty" / "checkpoints").mkdir(parents=True)
    with pytest.raises(ConfigError, match="is neither a checkpoint nor a run that holds one; give"):
        branch(pool, trunk, f"run.branch_from={place}")


def test_checkpoints_that_do_not_hold_the_whole_state(pool: Path, trunk: Config) -> None:
    weights = checkpoint(trunk, 240, optimizer_step=0)
    with pytest.raises(ConfigError, match="holds no optimizer state"):
        branch(pool, trunk, "data.epochs=9", f"run.branch_from={weights}")
    damaged = checkpoint(trunk, 248, state={"config": flatten(trunk), "train": {"step": "x"}})
    with pytest.raises(CheckpointError, match=r"is damaged: state .* train\.step"):
        branch(pool, trunk, "data.epochs=9", f"run.branch_from={damaged}")
    damaged = checkpoint(trunk, 256, state={})
    with pytest.raises(CheckpointError, match=r"is damaged: state .* config: it is missing"):
        branch(pool, trunk, "data.epochs=9", f"run.branch_from={damaged}")


def test_a_branch_has_one_start(pool: Path, trunk: Config) -> None:
    with pytest.raises(ConfigError, match=r"branch_from .* and run.init_from .* are both given"):
        branch(pool, trunk, "run.init_from=w.safetensors")
    with pytest.raises(ConfigError, match=r"branch_sha256 is given without run\.branch_from"):
        configuration(pool, trunk.run.path.parent, "b", f"run.branch_sha256={'0' * 64}")


def test_the_origin_of_a_repeated_branch_must_be_the_recorded_one(
    pool: Path, trunk: Config
) -> None:
    config = branch(pool, trunk)
    saved = write_run(config)
    again = preflight(compose(["run.name=again"], saved))
    assert again.run.branch_sha256 == config.run.branch_sha256
    assert config.run.branch_from is not None
    manifest = config.run.branch_from / "manifest.json"
    manifest.write_text(manifest.read_text() + " ")
    with pytest.raises(ConfigError, match=r"run\.branch_sha256 is .* another checkpoint than"):
        preflight(compose(["run.name=again"], saved))
    assert preflight(compose(["run.name=again", "run.branch_sha256=null"], saved))


def test_a_resumed_branch_does_not_look_at_its_origin(pool: Path, trunk: Config) -> None:
    """Neither the same command nor the saved file does, though the origin is gone."""
    config = branch(pool, trunk)
    saved = write_run(config)
    checkpoint(config, 96)
    place = trunk.run.path
    place.rename(place.with_name("elsewhere"))
    assert branch(pool, trunk) == config
    assert preflight(load_config(saved)) == config
    with pytest.raises(ConfigError, match=r"run\.branch_from: the run has .*, given None"):
        preflight(configuration(pool, place.parent, "branch", *DECAY))
    with pytest.raises(ConfigError, match=r"run\.branch_from: the run has .*, given '.*other'"):
        branch(pool, trunk, f"run.branch_from={place.parent / 'other'}")
