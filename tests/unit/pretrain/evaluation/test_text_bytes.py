"""Bits per byte divide by the bytes of exactly the text that was scored."""

from __future__ import annotations

import io
import json
import math

import numpy as np
import pytest
import torch

from data_pipeline.corpus.builtin import builtin_documents
from data_pipeline.corpus.source import SourceSettings
from data_pipeline.prepare.prepare import prepare
from data_pipeline.prepare.settings import PrepareSettings, TokenizerSettings
from data_pipeline.shards.pool import TokenPool
from data_pipeline.stream.budget import Budget
from data_pipeline.stream.mixture import MixtureSource, MixtureStream
from data_pipeline.stream.stream import TokenStream
from data_pipeline.tokenizer import load_tokenizer
from pretrain.config.objectives import objectives
from pretrain.config.run import EvaluationConfig, ModelConfig
from pretrain.data import clean_batch, token_space
from pretrain.evaluation.likelihood import evaluate_likelihood
from pretrain.evaluation.text_bytes import TextBytes
from pretrain.objectives import build_objective

LENGTH = 32


@pytest.fixture(scope="module")
def spaced(tmp_path_factory):
    """A pool of short documents whose tokenizer puts a space before each and drops it again."""
    import sentencepiece

    folder = tmp_path_factory.mktemp("spaced")
    documents = builtin_documents()
    texts = [text[:80].strip() for _, (_, text) in zip(range(120), documents, strict=False)]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, model_type="bpe", vocab_size=500,
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        add_dummy_prefix=True, hard_vocab_limit=False, num_threads=1, minloglevel=2,
    )  # fmt: skip
    (folder / "spaced.model").write_bytes(model.getvalue())
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (folder / "text.jsonl").write_text(lines)
    prepare(
        PrepareSettings(
            out=folder / "out",
            sources=(SourceSettings(path=str(folder / "text.jsonl")),),
            tokenizer=TokenizerSettings(path=folder / "spaced.model"),
            validation_fraction=0.3,
            workers=1,
        )
    )
    assert load_tokenizer(folder / "out" / "tokenizer.model").prefix_bytes == 1
    return folder / "out"


def stream_of(pool, *, documents="packed", epochs=1.0, order="sequential", split="validation"):
    tokens = TokenPool(pool / split / "manifest.json")
    budget = Budget(None, LENGTH, tokens.manifest.tokens)
    return TokenStream(tokens, budget, seed=3, order=order, documents=documents, epochs=epochs)


def evaluated(pool, stream, **settings):
    """Evaluation of a model that gives every token one nat."""
    tokenizer = load_tokenizer(pool / "tokenizer.model")
    objective = build_objective(
        objectives.make("autoregressive", time_window=8), token_space(tokenizer, ModelConfig())
    )

    def score(batch):
        total = torch.zeros(len(batch.ids), dtype=torch.float64)
        return total.index_add(0, batch.sequence, batch.weight)

    return evaluate_likelihood(
        objective,
        stream,
        score,
        EvaluationConfig(batch_size=5, **settings),
        TextBytes(tokenizer),
        device=torch.device("cpu"),
    )


def decoded_bytes(pool, rows) -> int:
    """UTF-8 bytes of the valid tokens of rows, decoded piece by piece.

    Pieces are decoded after an ordinary one, so that a space at their start stays; those that open
    a document are decoded as they stand.
    """
    tokenizer = load_tokenizer(pool / "tokenizer.model")
    before = tokenizer.encode("x")
    total, opens = 0, False
    for row in rows:
        for token, valid in row:
            if token == tokenizer.doc_id:
                opens = True
            elif valid:
                piece = tokenizer.piece(token)
                if piece.startswith("<0x") and len(piece) == 6:
                    total += 1
                else:
                    text = tokenizer.decode([token] if opens else [*before, token])
                    total += len(text.encode()) - (0 if opens else 1)
                opens = False
    return total


@pytest.fixture(params=["pool", "spaced"])
def prepared(request):
    return request.getfixturevalue(request.param)


def test_a_whole_pool_has_the_bytes_of_its_text(prepared):
    """Both counts agree with the manifest, whose bytes are those of the documents."""
    manifest = TokenPool(prepared / "validation" / "manifest.json").manifest
    assert manifest.round_trip.failed == 0
    packed = evaluated(prepared, stream_of(prepared))
    masked = evaluated(prepared, stream_of(prepared, documents="masked"))
    assert packed.text_bytes == masked.text_bytes == manifest.raw_bytes
    assert packed.tokens == manifest.tokens
    assert masked.tokens == manifest.tokens - manifest.documents.count
    for result in (packed, masked):  # one nat a token
        assert result.nats_per_token == pytest.approx(1.0)
        want = result.tokens / math.log(2) / manifest.raw_bytes
        assert result.bits_per_byte == pytest.approx(want, rel=1e-12)
    assert masked.bits_per_byte < packed.bits_per_byte


@pytest.mark.parametrize("documents", ["packed", "masked"])
@pytest.mark.parametrize("sequences", [1, 7])
def test_a_subset_has_the_bytes_that_its_tokens_decode_to(prepared, documents, sequences):
    stream = stream_of(prepared, documents=documents)
    result = evaluated(prepared, stream, sequences=sequences)
    batch = stream.read(np.arange(sequences))
    rows = [list(zip(*row, strict=True)) for row in zip(batch.tokens, batch.valid, strict=True)]
    doc_id = stream.pool.manifest.tokenizer.doc_id
    rows.insert(0, [(doc_id, False)])  # the pool begins with a document
    assert result.text_bytes == decoded_bytes(prepared, rows)
    assert result.tokens == batch.valid.sum()
    whole = evaluated(prepared, stream)
    assert result.bits_per_byte != whole.bits_per_byte


def test_rows_in_any_order_know_that_they_open_a_document(spaced):
    """In a shuffled stream the token before a row stands in another one."""
    manifest = TokenPool(spaced / "train" / "manifest.json").manifest
    shuffled = stream_of(spaced, split="train", order="global")
    assert evaluated(spaced, shuffled).text_bytes == manifest.raw_bytes
    beyond = clean_batch(shuffled.read(np.arange(shuffled.total_positions, 10**6, 10**5)))
    counter = TextBytes(load_tokenizer(spaced / "tokenizer.model"))
    assert not counter.count(beyond, shuffled).any()


def test_several_sources_and_several_epochs(spaced):
    """A mix counts the bytes of what it visits; a repeated pool is scored once by default."""
    train = TokenPool(spaced / "train" / "manifest.json").manifest
    other = TokenPool(spaced / "validation" / "manifest.json").manifest
    repeated = stream_of(spaced, split="train", order="global", epochs=3)
    once = evaluated(spaced, repeated)
    assert (once.text_bytes, once.tokens) == (train.raw_bytes, train.tokens)
    twice = evaluated(spaced, repeated, sequences=2 * repeated.sequences_per_epoch)
    assert (twice.text_bytes, twice.tokens) == (2 * train.raw_bytes, 2 * train.tokens)
    sources = [
        MixtureSource("a", stream_of(spaced, split="train", order="global")),
        MixtureSource("b", stream_of(spaced, order="global")),
    ]
    mixed = evaluated(spaced, MixtureStream(sources, "proportional", seed=1, epochs=1))
    assert mixed.text_bytes == train.raw_bytes + other.raw_bytes
