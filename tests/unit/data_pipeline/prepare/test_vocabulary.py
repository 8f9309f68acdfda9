"""The vocabulary is chosen, or refused with its limits, before a tokenizer is trained."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

import data_pipeline.prepare.make_tokenizer as make_tokenizer
from data_pipeline.corpus.source import SourceSettings
from data_pipeline.errors import TokenizerError
from data_pipeline.prepare.prepare import PreparedData, prepare
from data_pipeline.prepare.settings import PrepareSettings, TokenizerSettings
from data_pipeline.prepare.vocabulary import choose_vocabulary, usual_size
from data_pipeline.tokenizer import SentencePieceTokenizer, load_tokenizer, train_sentencepiece

IDEOGRAPHS = [chr(0x4E00 + i) for i in range(900)]


def many_characters() -> list[str]:
    """Texts with a large alphabet, of which one character in ten is common."""
    draw = random.Random(0)
    words = IDEOGRAPHS[:90] * 30 + IDEOGRAPHS
    return ["".join(draw.choices(words, k=400)) + "\ttab \n" for _ in range(100)]


def trained(texts: list[str], size: int, coverage: float) -> int:
    model = train_sentencepiece(
        texts, vocab_size=size, model_type="bpe", character_coverage=coverage
    )
    return SentencePieceTokenizer(model, "a test").vocab_size


@pytest.mark.parametrize("coverage", [0.98, 0.9995, 1.0])
def test_the_least_vocabulary_is_that_of_the_trainer(coverage: float) -> None:
    """The named size can be trained, and one id less is refused by the trainer too."""
    texts = many_characters()
    settings = TokenizerSettings(vocab_size=300, character_coverage=coverage)
    with pytest.raises(TokenizerError, match=r"raise vocab_size to at least \d+$") as told:
        choose_vocabulary(texts, settings)
    assert "lower" not in str(told.value)  # no coverage brings this text to 300 ids
    least = int(str(told.value).split("at least ")[1])
    assert trained(texts, least, coverage) == least
    with pytest.raises(TokenizerError, match=f"raise vocab_size to at least {least}, or lower"):
        trained(texts, least - 1, coverage)
    if coverage > 0.98:
        with pytest.raises(TokenizerError, match=f"at least {least}, or lower character_coverage"):
            choose_vocabulary(texts, settings.model_copy(update={"vocab_size": least - 1}))
    assert choose_vocabulary(texts, settings.model_copy(update={"vocab_size": least})).given


def test_the_usual_size_grows_with_the_root_of_the_text() -> None:
    sizes = [usual_size(n, 100) for n in (0, 97_000, 98_000, 400_000, 1_600_000, 8_800_000)]
    assert sizes == [500, 500, 1000, 2000, 4000, 8000]
    assert usual_size(30_000_000, 100) == 16_000
    assert usual_size(100_000_000, 100) == usual_size(10**12, 100) == 32_000
    assert usual_size(54_000, 2988) == 8000  # room for the alphabet, whatever the text


def test_too_few_pieces_give_one_advice_with_the_limit() -> None:
    texts = ["a little text that is too short " * 3]
    with pytest.raises(TokenizerError, match=r"lower vocab_size to \d+ or less") as told:
        trained(texts, 9999, 0.9995)
    assert "raise" not in str(told.value)
    limit = int(str(told.value).split("vocab_size to ")[1].split()[0])
    assert trained(texts, limit, 0.9995) == limit


def prepared(out: Path, source: Path, **tokenizer: object) -> PreparedData:
    return prepare(
        PrepareSettings(
            out=out,
            sources=(SourceSettings(path=str(source), split="lines"),),
            tokenizer=TokenizerSettings.model_validate(tokenizer),
            validation_fraction=0.2,
            workers=1,
        )
    )


def test_text_of_any_size_can_be_prepared_by_default(tmp_path: Path) -> None:
    """Where the text gives fewer pieces than the chosen size, the tokenizer has fewer."""
    for name, lines in (
        ("tiny", ["one line", "another line", "and a third", "a fourth", "the fifth", "end"]),
        ("ideographs", many_characters()[:60]),
    ):
        source = tmp_path / f"{name}.txt"
        source.write_text("\n".join(lines))
        result = prepared(tmp_path / name, source)
        chosen = result.report["vocabulary"]
        held = load_tokenizer(result.tokenizer).vocab_size
        assert not chosen["given"]
        assert 262 + chosen["characters"] <= held <= chosen["size"]


def test_a_vocabulary_that_is_too_small_is_refused_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(make_tokenizer, "train_sentencepiece", None)
    source = tmp_path / "a.txt"
    source.write_text("\n".join(many_characters()))
    with pytest.raises(TokenizerError, match=r"raise vocab_size to at least 11\d\d"):
        prepared(tmp_path / "out", source, vocab_size=1000)
