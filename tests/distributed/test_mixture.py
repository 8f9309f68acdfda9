"""Runs on a mix: the same in every layout, and damaged data ends every rank with the same error."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import runs
from comparison import assert_same_curve
from harness import run_ranks

from data_pipeline.corpus.source import SourceSettings
from data_pipeline.prepare.prepare import prepare
from data_pipeline.prepare.settings import PrepareSettings, TokenizerSettings


@pytest.fixture(scope="module")
def mix(pool: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A weighted mix of the pool and of invented arithmetic: 32 + 15 sequences an epoch."""
    folder = tmp_path_factory.mktemp("mix")
    with (folder / "sums.jsonl").open("w") as file:
        for a in range(200):
            text = "\n".join(f"{a} + {b} = {a + b}" for b in range(8))
            file.write(json.dumps({"id": str(a), "text": text}) + "\n")
    prepare(
        PrepareSettings(
            out=folder / "sums",
            sources=(SourceSettings(path=str(folder / "sums.jsonl")),),
            tokenizer=TokenizerSettings(path=pool / "tokenizer.model"),
            validation_fraction=0.02,
        )
    )
    text, sums = pool / "train" / "manifest.json", "sums/train/manifest.json"
    sources = [
        {"name": "text", "manifest": str(text), "unique_tokens": 1000, "weight": 1},
        {"name": "sums", "manifest": sums, "unique_tokens": 480, "weight": 3, "max_epochs": 6},
    ]
    path = folder / "mix.json"
    path.write_text(json.dumps({"format": "mixture/1", "mode": "weighted", "sources": sources}))
    return path


def test_two_ranks_and_a_resume_give_the_one_rank_curve(
    pool: Path, tmp_path: Path, mix: Path, undisturbed
) -> None:
    more = ("objective=masked", f"data.train={mix}", "data.unique_tokens=null")
    assert run_ranks(2, runs.train, pool, tmp_path, *more, "train.stop_step=6") == [0, 0]
    assert max(runs.log(tmp_path)) == 6 < runs.STEPS
    assert run_ranks(2, runs.train, pool, tmp_path, *more) == [0, 0]
    assert_same_curve(tmp_path, undisturbed(*more))


def test_damage_that_only_the_first_rank_looks_for_ends_both(pool: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "pool"
    shutil.copytree(pool, damaged)
    shard = next((damaged / "train").glob("*.tar"))
    content = bytearray(shard.read_bytes())
    content[600] ^= 1
    shard.write_bytes(content)
    assert run_ranks(2, runs.train, damaged, tmp_path / "run", "objective=masked") == [3, 3]
