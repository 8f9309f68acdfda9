"""Names that MLflow allows for parameters and metrics; the mapping can be undone.

MLflow allows letters, digits and `_-./: ` and refuses names that would be another path (`a//b`).
Another character becomes `-xHEX-`, its code point; so does the hyphen of a name that already looks
like this. Names of up to 250 characters differ exactly where the names before the mapping do.
"""

from __future__ import annotations

import posixpath
import re
from hashlib import sha256

MAX_LENGTH = 250
_REFUSED = re.compile(r"[^\w.\- :/]|-(?=x[0-9A-F]+-)")


def to_mlflow(name: str) -> str:
    """Name in MLflow; one of more than 250 characters ends in a hash, which cannot be undone."""
    mapped = _REFUSED.sub(_escape, name)
    if posixpath.normpath(mapped) != mapped or mapped.startswith(("/", "..")) or mapped == ".":
        mapped = re.sub(r"[./]", _escape, mapped)
    if len(mapped) <= MAX_LENGTH:
        return mapped
    digest = sha256(name.encode(errors="surrogatepass")).hexdigest()[:16]
    return f"{mapped[: MAX_LENGTH - 17]}-{digest}"


def _escape(found: re.Match[str]) -> str:
    return f"-x{ord(found[0]):X}-"
