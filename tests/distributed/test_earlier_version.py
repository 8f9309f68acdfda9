"""A run that version 0.1.0 began goes on under this one: `tests/fixtures/run_0_1_0`.

The fixture holds its configuration, pool, checkpoint of step 8, and the metrics of all 15 steps.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from harness import run_ranks

FIXTURE = Path(__file__).parents[1] / "fixtures" / "run_0_1_0"
SAVED, END = 8, 15


def arguments(run: Path) -> list[str]:
    """The run's own configuration; it and its pool have moved since."""
    pool = run / "pool"
    return [
        "--config",
        str(run / "config.yaml"),
        f"run.dir={run}",
        f"data.train={pool / 'train' / 'manifest.json'}",
        f"data.validation={pool / 'validation' / 'manifest.json'}",
        f"data.tokenizer={pool / 'tokenizer.model'}",
    ]


def restored(run: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """What a session takes from the checkpoint: its state, and every tensor under its key."""
    from data_pipeline.stream.cursor import Cursor
    from parallel.checkpoint.plan import key
    from parallel.runtime import init_distributed
    from pretrain.config.compose import compose
    from pretrain.config.preflight import preflight
    from pretrain.training.session import open_session

    flag, file, *overrides = arguments(run)
    assert flag == "--config"
    config = preflight(compose(overrides, Path(file)))
    session = open_session(config, init_distributed(device="cpu"))
    cursor = Cursor.at(session.train_stream, session.state.position)
    engine = session.engine
    kinds = ("weight", *engine.kinds)
    tensors = {key(n, k): engine.read(n, k).clone() for n in engine.shapes for k in kinds}
    return {"train": session.state.to_dict(), "cursor": cursor.to_dict()}, tensors


def resume(run: Path, *more: str) -> int:
    from pretrain import train

    return train.main([*arguments(run), *more])


def evaluate(run: Path) -> dict[str, Any]:
    from pretrain.evaluation.run import evaluate_run

    return evaluate_run(run)


def bytes_per_token(pool: Path) -> tuple[float, float]:
    """UTF-8 bytes a token of the validation pool, and of its first 16 sequences, decoded."""
    from data_pipeline.shards.pool import TokenPool
    from data_pipeline.tokenizer import load_tokenizer

    tokens = TokenPool(pool / "validation" / "manifest.json")
    scored = tokens.tokens(0, 16 * 32).tolist()
    text = load_tokenizer(pool / "tokenizer.model").decode(scored)
    assert "\ufffd" not in text
    return tokens.manifest.bytes_per_token, len(text.encode()) / len(scored)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return shutil.copytree(FIXTURE, tmp_path / "run")


def test_everything_is_restored(run: Path) -> None:
    state, tensors = run_ranks(1, restored, run, launcher=False)[0]
    want = runs.checkpoint(FIXTURE, SAVED)
    saved = want.pop("state")
    since = {"lowest_loss", "lowest_step", "reference_loss", "evaluations_without_improvement"}
    assert since.isdisjoint(saved["train"])
    nothing_seen = {name: state["train"].pop(name) for name in since}
    assert not any(nothing_seen.values())
    assert state == saved
    assert state["train"]["step"] == SAVED
    assert tensors.keys() == want.keys()
    assert {name.partition("/")[0] for name in tensors if "/" in name} == {
        "exp_avg",
        "exp_avg_sq",
        "ema",
    }
    for name, tensor in want.items():
        assert torch.equal(tensors[name], tensor), name


@pytest.mark.parametrize(
    ("ranks", "layout", "rel"),
    [(1, (), 1e-6), (2, ("parallel.data_parallel_size=2", "parallel.zero_stage=2"), 1e-5)],
)
def test_the_curve_goes_on_and_is_evaluated(
    run: Path, ranks: int, layout: tuple[str, ...], rel: float
) -> None:
    """Arithmetic of another CPU rounds otherwise, hence no bitwise comparison."""
    assert run_ranks(ranks, resume, run, *layout) == [0] * ranks
    ours, theirs = runs.log(run), runs.log(FIXTURE)
    bytes_of_pool, bytes_of_text = bytes_per_token(run / "pool")
    assert sorted(ours) == sorted(theirs) == list(range(1, END + 1))
    for step in range(SAVED + 1, END + 1):
        assert ours[step].keys() == theirs[step].keys()
        for name, value in theirs[step].items():
            # 0.1.0 took the bytes of the whole pool for those of 16 sequences.
            value *= bytes_of_pool / bytes_of_text if name.endswith("bits_per_byte") else 1.0
            assert ours[step][name] == pytest.approx(value, rel=rel), (step, name)
    result = run_ranks(1, evaluate, run, launcher=False)[0]
    assert result["step"] == END
    assert result["weights"] == "ema"
    recorded = theirs[END]["validation/nats_per_token"]
    assert result["nats_per_token"] == pytest.approx(recorded, rel=rel)
    status = json.loads((run / "status.json").read_text())
    assert (status["state"], status["step"]) == ("finished", END)
