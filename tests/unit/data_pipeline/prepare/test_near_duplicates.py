"""Near-duplicates: copies are dropped, and training holds nothing that validation resembles."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.corpus.source import SourceSettings
from data_pipeline.prepare.prepare import prepare
from data_pipeline.prepare.settings import PrepareSettings, TokenizerSettings
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.pool import TokenPool
from data_pipeline.tokenizer import load_tokenizer


def test_near_duplicates_are_dropped_and_validation_stays_uncontaminated(
    tmp_path: Path, texts: list[str], tokenizer_file: Path
) -> None:
    pytest.importorskip("datasketch", reason="needs the data extra")
    texts = [text[:800] for text in texts[:60]]
    edited = [
        text.replace(" the ", "  The ", 1) + "\nThe end." for text in texts if len(text) > 600
    ]
    path = tmp_path / "a.jsonl"
    both = [json.dumps({"id": t[:40], "body": t}) + "\n" for t in [*texts, *edited]]
    path.write_text("".join(both))
    source = SourceSettings(path=str(path), name="s", text_field="body")
    options = {"sources": (source,), "tokenizer": TokenizerSettings(path=tokenizer_file)}
    common = {**options, "validation_fraction": 0.3, "workers": 1}
    kept = prepare(PrepareSettings(out=tmp_path / "kept", **common))  # type: ignore[arg-type]
    less = prepare(PrepareSettings(out=tmp_path / "less", near_duplicates=0.8, **common))  # type: ignore[arg-type]
    report = less.report["near_duplicates"]
    assert report["copies"] + report["train_like_validation"] >= 0.9 * len(edited)
    assert report["train_like_validation"] > 0
    documents = {
        split: Manifest.load(getattr(less, split)).documents.count
        for split in ("train", "validation")
    }
    before = Manifest.load(kept.train).documents.count
    before += Manifest.load(kept.validation).documents.count
    assert sum(documents.values()) == before - report["copies"] - report["train_like_validation"]
    words = [set(text.split()) for text in pool_texts(less.train, tokenizer_file)]
    for text in pool_texts(less.validation, tokenizer_file):
        held = set(text.split())
        assert all(len(held & w) < 0.9 * len(held | w) for w in words if len(held) > 60)


def pool_texts(manifest: Path, tokenizer: Path) -> list[str]:
    pool, model = TokenPool(manifest), load_tokenizer(tokenizer)
    tokens = pool.tokens(0, pool.num_tokens)
    ends = np.flatnonzero(tokens == model.doc_id)
    return [model.decode(part.tolist()) for part in np.split(tokens, ends + 1)[:-1]]
