"""Printed samples: no text steers the terminal; a prompt never ends with a space."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import pretrain.cli.main as cli
import pretrain.sampling.run as sampling
from pretrain.cli.output import visible

WILD = "The\x1b]0;title\x07 end\x9b2J\r\nnext\rline\ttab \u202fé"
SHOWN = "The\\x1b]0;title\\x07 end\\x9b2J\r\nnext\\rline\ttab \u202fé"


def test_control_characters_are_escaped_and_line_ends_stay() -> None:
    assert visible(WILD) == SHOWN
    assert visible("half \ud83d pair") == "half \\ud83d pair"


def test_samples_are_printed_escaped_and_given_exactly_as_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    drawn = {"index": 0, "sampler": "x", "seed": 0, "network_evaluations": 1, "text": WILD}
    prompts: list[str] = []

    def sample_run(*_: object, prompt: str, **__: object) -> list[dict[str, Any]]:
        prompts.append(prompt)
        return [drawn]

    monkeypatch.setattr(sampling, "sample_run", sample_run)
    for words, noted in ((["--prompt", "The "], True), (["--prompt", "The", "--json"], False)):
        monkeypatch.setattr(sys, "argv", ["epochal", "sample", str(tmp_path), *words])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert not ended.value.code
        printed = capsys.readouterr()
        assert ("the space at the end of the prompt is left out" in printed.err) == noted
        if "--json" in words:
            assert json.loads(printed.out)[0]["text"] == WILD
        else:
            assert SHOWN in printed.out
            assert "\x1b" not in printed.out


def test_the_space_at_the_end_of_a_prompt_is_not_encoded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    encoded: list[str] = []

    def encode(prompt: str) -> list[int]:
        encoded.append(prompt)
        return [0] * 99  # too many for a sequence, which ends the call

    restored = SimpleNamespace(
        module=SimpleNamespace(objective=None), tokenizer=SimpleNamespace(encode=encode)
    )
    monkeypatch.setattr(sampling, "restore", lambda *_: restored)
    settings: Any = SimpleNamespace(load=lambda: lambda *_: None)
    for prompt in ("The  ", "a\n", " b"):
        with pytest.raises(Exception, match="the prompt has 99 tokens"):
            sampling.sample_run(tmp_path, settings, prompt=prompt, length=9)
    assert encoded == ["The", "a\n", " b"]
