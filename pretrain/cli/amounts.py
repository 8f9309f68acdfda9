"""Amounts on the command line, e.g. 300B, 1.5T or 2e12."""

from __future__ import annotations

import re

_COUNT = re.compile(r"(\d+(?:\.\d+)?(?:[eE]\+?\d+)?)\s*([KkMmBbGgTt]?)")
_FACTORS = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9, "t": 1e12}


def parse_amount(option: str, text: str) -> float:
    """Parse the value of `option`; commas and underscores between digits are ignored.

    Raises:
        ConfigError: A text that is no number.
    """
    from pretrain.errors import ConfigError

    match = _COUNT.fullmatch(text.strip().replace(",", "").replace("_", ""))
    if match is None:
        raise ConfigError(f"{option} is {text!r}; write a number, e.g. 300B, 1.5T or 2e12")
    return float(match[1]) * _FACTORS[match[2].lower()]
