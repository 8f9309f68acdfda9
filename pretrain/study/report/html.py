"""Pieces of HTML: escaped text, tables, sections."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape


def table(headers: Sequence[str], rows: Iterable[Sequence[object]], caption: str = "") -> str:
    """Table of texts and numbers; numbers are aligned right."""
    head = "".join(f"<th>{escape(text)}</th>" for text in headers)
    body = "".join(f"<tr>{''.join(_cell(value) for value in row)}</tr>" for row in rows)
    about = f"<caption>{escape(caption)}</caption>" if caption else ""
    return (
        f'<div class="wide"><table>{about}<thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def paragraph(text: str, kind: str = "") -> str:
    """Paragraph of plain text."""
    chosen = f' class="{kind}"' if kind else ""
    return f"<p{chosen}>{escape(text)}</p>"


def bullets(texts: Iterable[str]) -> str:
    """List of sentences; nothing for none."""
    items = "".join(f"<li>{escape(text)}</li>" for text in texts)
    return f"<ul>{items}</ul>" if items else ""


def section(name: str, title: str, *parts: str) -> str:
    """Section with an anchor."""
    return f'<section id="{name}"><h2>{escape(title)}</h2>{"".join(parts)}</section>'


def with_error(value: float, error: float) -> str:
    """Value with twice its standard error, to two digits of the error."""
    if not math.isfinite(value):
        return "none"
    if not math.isfinite(error):
        return f"{value:.3f} ± ?"
    if error == 0:
        return f"{value:.3f}"
    digits = max(0, 1 - math.floor(math.log10(2 * error)))
    return f"{value:.{digits}f} ± {2 * error:.{digits}f}"


def _cell(value: object) -> str:
    kind = ' class="number"' if isinstance(value, int | float) else ""
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return f"<td{kind}>{escape(text)}</td>"
