"""The tokenizer of a preparation: a given file, or one trained on the training documents."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from data_pipeline.prepare.settings import PrepareSettings
from data_pipeline.prepare.tokenise import Buckets
from data_pipeline.prepare.vocabulary import Vocabulary, choose_vocabulary
from data_pipeline.progress import Progress
from data_pipeline.shards.files import write_atomically
from data_pipeline.tokenizer import load_tokenizer, train_sentencepiece


def make_tokenizer(
    settings: PrepareSettings, buckets: Buckets, staging: Path, progress: Progress
) -> tuple[Path, dict[str, Any] | None]:
    """Path of the output's tokenizer, and the choice of its vocabulary where it is trained.

    TokenizerError for an unusable file, or for a vocabulary that the text cannot fill.
    """
    chosen = settings.tokenizer
    suffix = chosen.path.suffix if chosen.path is not None else ".model"
    path = settings.out / f"tokenizer{suffix}"
    if chosen.path is not None:
        if not path.exists():
            load_tokenizer(chosen.path)
            write_atomically(path, chosen.path.read_bytes())
        return path, None
    vocabulary = _vocabulary(settings, buckets, staging / "vocabulary.json", progress)
    if not path.exists():
        progress.note(vocabulary.words)
        progress.start(f"training a {chosen.model_type} tokenizer", None, "")
        model = train_sentencepiece(
            buckets.training_texts(chosen.train_bytes),
            vocab_size=vocabulary.size,
            exact=vocabulary.given,
            model_type=chosen.model_type,
            num_threads=chosen.num_threads,
            character_coverage=chosen.character_coverage,
        )
        write_atomically(path, model)
    return path, vocabulary.to_dict()


def _vocabulary(
    settings: PrepareSettings, buckets: Buckets, path: Path, progress: Progress
) -> Vocabulary:
    """Choice of the vocabulary, which an earlier start may have made."""
    if not path.exists():
        progress.start("measuring the text", None, "")
        texts = buckets.training_texts(settings.tokenizer.train_bytes)
        found = choose_vocabulary(texts, settings.tokenizer)
        write_atomically(path, json.dumps(found.to_dict()))
    return Vocabulary(**json.loads(path.read_text(encoding="utf-8")))
