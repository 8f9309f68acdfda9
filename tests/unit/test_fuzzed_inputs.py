"""Random settings, configuration files and texts: a message or a result, never a traceback.

Slow. `tests/unit/test_fuzzed_formats.py` does the same to the formats that this package writes.
"""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from data_pipeline.errors import DataError
from data_pipeline.prepare.prepare import prepare
from data_pipeline.prepare.settings import PrepareSettings, TokenizerSettings
from pretrain.config.compose import compose, known_keys, save_config
from pretrain.config.preflight import preflight

VALUES = [
    "", "0", "-1", "1", "2", "1e30", "1e-30", "nan", "inf", "-inf", "null", "true", "[]", "{}",
    "[1,2]", "{a: 1}", "x", "../../etc", "/dev/zero", "9" * 400, "'", "\x00", "é\udcff", "${run}",
    "${oc.env:HOME}", "window(0)", "window(99999999999999999999)", "0x10", "1_000", "a=b", "  ",
]  # fmt: skip


def refusal(call: Callable[[], object]) -> Exception | None:
    """The error that a call raises."""
    try:
        call()
    except Exception as error:
        return error
    return None


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_settings(seed: int, pool: Path, tmp_path: Path) -> None:
    """One to three settings of a good run are replaced by values of other kinds."""
    chance, keys = random.Random(seed), known_keys()
    good = [
        "model=tiny",
        f"data.train={pool / 'train' / 'manifest.json'}",
        f"data.validation={pool / 'validation' / 'manifest.json'}",
        f"data.tokenizer={pool / 'tokenizer.model'}",
        f"run.root={tmp_path}",
    ]
    refused = 0
    for _ in range(60):
        wrong = [
            f"{chance.choice(keys)}={chance.choice(VALUES)}" for _ in range(chance.randint(1, 3))
        ]
        error = refusal(lambda words=wrong: preflight(compose([*good, *words])))
        assert error is None or (hasattr(error, "exit_code") and str(error)), (wrong, repr(error))
        refused += error is not None
    assert refused > 20
    assert not list(tmp_path.iterdir()), "a check writes nothing"


@pytest.mark.slow
def test_saved_configurations(pool: Path, tmp_path: Path) -> None:
    """A saved configuration with bytes flipped, lines dropped or doubled, values replaced."""
    chance, file = random.Random(7), tmp_path / "config.yaml"
    config = compose(["model=tiny", f"data.tokenizer={pool / 'tokenizer.model'}"])
    save_config(config, file)
    whole = file.read_bytes()
    for _ in range(150):
        damaged = bytearray(whole)
        for _ in range(chance.randint(1, 4)):
            place = chance.randrange(len(damaged))
            match chance.randrange(3):
                case 0:
                    damaged[place] = chance.randrange(256)
                case 1:
                    del damaged[place : place + chance.randrange(60)]
                case 2:
                    damaged[place:place] = damaged[place : place + chance.randrange(60)]
        file.write_bytes(damaged)
        error = refusal(lambda: compose([], file))
        assert error is None or hasattr(error, "exit_code"), (bytes(damaged), repr(error))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_texts(seed: int, tmp_path: Path) -> None:
    """Files of every ending with damaged content, prepared with `--skip-bad`."""
    chance = random.Random(seed)
    good = [f"A sentence of some words, number {i}, and then another one.\n\n" for i in range(400)]
    for number in range(12):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "good.jsonl").write_text(
            "".join(
                json.dumps({"text": text * 3, "id": str(i)}) + "\n" for i, text in enumerate(good)
            )
        )
        content = bytearray("".join(good[:50]).encode())
        for _ in range(chance.randint(1, 30)):
            content[chance.randrange(len(content))] = chance.randrange(256)
        ending = chance.choice(
            ["txt", "jsonl", "json", "csv", "parquet", "txt.gz", "jsonl.xz", "md.bz2", "txt.zst"]
        )
        raw = bytes(content)
        (folder / f"bad.{ending}").write_bytes(gzip.compress(raw)[:-9] if "gz" in ending else raw)
        settings = PrepareSettings(
            sources=(str(folder),),
            out=folder / "pool",
            tokenizer=TokenizerSettings(vocab_size=300, model_type="bpe"),
            validation_fraction=0.1,
            skip_bad=10_000,
            workers=1,
        )
        error = refusal(lambda given=settings: prepare(given))
        assert error is None or isinstance(error, DataError), (ending, repr(error))
