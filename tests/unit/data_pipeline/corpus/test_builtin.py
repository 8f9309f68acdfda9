"""The built-in corpus: enough text for a demonstration, the same at every reading."""

from __future__ import annotations

from itertools import islice

from data_pipeline.corpus.builtin import builtin_documents


def test_builtin_corpus_is_several_megabytes_and_stable() -> None:
    first = list(builtin_documents())
    assert first[:90] == list(islice(builtin_documents(), 90))
    assert sum(len(text) for _, text in first) > 2_000_000
    assert len({name for name, _ in first}) == len(first)
