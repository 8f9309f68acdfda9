"""Passwords in addresses: refused in a new configuration, taken out of an earlier one.

A configuration is written to config.yaml, to every checkpoint and exported file, to trackers and
logs. So it may hold no password; the environment and `.netrc` do.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import unquote

log = logging.getLogger(__name__)

_USER = re.compile(
    r"(?P<scheme>\b[A-Za-z][\w+.-]*://)(?P<user>[^\s/?#@'\":]*)(?::(?P<password>[^\s/?#]*))?@"
)
"""Address with a user, and perhaps a password, before its host."""
_QUERY = re.compile(
    r"(?P<key>[?&;][\w.-]*(?:password|passwd|pwd|token|secret|signature|credential|api_?key|sig)=)"
    r"[^\s&;#'\"]+",
    re.IGNORECASE,
)
"""Parameter of an address that is a password, a key or a signature."""
REMEDY = (
    "a configuration is written to the run folder, checkpoints, exports and trackers; give the "
    "address without it, and the credentials in the environment (MLFLOW_TRACKING_USERNAME and "
    "MLFLOW_TRACKING_PASSWORD; PGPASSWORD for a database) or in ~/.netrc"
)


def redacted(text: str) -> str:
    """Copy of `text` in which passwords of addresses are replaced by `***`."""
    text = _USER.sub(lambda m: m["scheme"] + ("***@" if _is_secret(m) else f"{m['user']}@"), text)
    return _QUERY.sub(lambda m: m["key"] + "***", text)


def holds_secret(value: object) -> bool:
    """True for a text with an address that carries a password, key or signature."""
    return isinstance(value, str) and redacted(value) != value


def keys_with_secrets(values: Mapping[str, Any]) -> list[str]:
    """Dotted keys of the values that carry a password, key or signature."""
    return [key for key, value in _leaves("", values) if holds_secret(value)]


def without_secrets(values: Any) -> Any:
    """Copy of plain nested values in which passwords are replaced."""
    if isinstance(values, Mapping):
        return {key: without_secrets(value) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return [without_secrets(value) for value in values]
    return redacted(values) if isinstance(values, str) else values


def take_out(text: str, origin: Path) -> str:
    """Take passwords out of the text of an earlier version's configuration.

    Those of a tracking server go to the environment of this process, where they still work, unless
    the user has set others there.
    """
    if not holds_secret(text):
        return text

    def plain(match: re.Match[str]) -> str:
        user, password = unquote(match["user"]), unquote(match["password"] or "")
        if not _is_secret(match):
            return match[0]
        if match["scheme"].startswith("http"):
            os.environ.setdefault("MLFLOW_TRACKING_USERNAME", user)
            os.environ.setdefault("MLFLOW_TRACKING_PASSWORD", password)
            return match["scheme"]
        if match["scheme"].startswith("postgresql"):
            os.environ.setdefault("PGPASSWORD", password)
        return f"{match['scheme']}{match['user']}@"

    _tell(origin)
    return _QUERY.sub(lambda m: m["key"] + "***", _USER.sub(plain, text))


@lru_cache
def _tell(origin: Path) -> None:
    log.warning(
        "%s holds a password of a server, which is taken out of it: %s. Checkpoints and copies "
        "that an earlier version wrote still hold it; change the password",
        origin,
        REMEDY,
    )


def _is_secret(match: re.Match[str]) -> bool:
    """True unless it is the user of a database alone, without whom it cannot be addressed."""
    return match["password"] is not None or match["scheme"].startswith("http")


def _leaves(prefix: str, node: object) -> Iterator[tuple[str, object]]:
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield from _leaves(f"{prefix}.{key}" if prefix else str(key), value)
    elif isinstance(node, list | tuple):
        for number, value in enumerate(node):
            yield from _leaves(f"{prefix}.{number}", value)
    else:
        yield prefix, node
