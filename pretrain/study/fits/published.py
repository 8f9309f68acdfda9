"""Published laws, and reconstructions of published laws whose coefficients are not printed.

The coefficients stand in `published.json` beside this module, each with its source.
"""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files

from pretrain.errors import ConfigError
from pretrain.study.fits.fitted import Fitted


@cache
def published() -> dict[str, Fitted]:
    """Every law of the packaged file, by its name."""
    text = files("pretrain.study.fits").joinpath("published.json").read_text("utf-8")
    return {name: Fitted.from_dict(given) for name, given in json.loads(text).items()}


def published_law(name: str) -> Fitted:
    """One published law.

    Raises:
        ConfigError: An unknown name.
    """
    laws = published()
    if name not in laws:
        raise ConfigError(f"no published law {name!r}; there are {', '.join(laws)}")
    return laws[name]
