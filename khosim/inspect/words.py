"""Numbers and names as a reader of 80 columns wants them."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable

__all__ = ("clean", "fit", "paragraph", "size_text")

WIDTH = 80


def clean(text: str) -> str:
    """Text from foreign memory without anything that would move a terminal's cursor."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def fit(text: str, width: int) -> str:
    """Cleaned text, cut to ``width`` columns."""
    text = clean(text)
    return text if len(text) <= width else text[: width - 1] + "~"


def size_text(len_bytes: int) -> str:
    """A size in three significant digits: ``512``, ``4K``, ``1.5M``, ``22.2G``."""
    value = float(len_bytes)
    for suffix in ("", "K", "M", "G", "T"):
        if value < 1000 or (suffix and value < 1024):
            break
        value /= 1024
    else:
        suffix = "P"
    return f"{value:.3g}{suffix}" if value < 1000 else f"{value:.0f}{suffix}"


def paragraph(label: str, text: str, indent: int) -> Iterable[str]:
    """``label`` and text in lines of 80 columns, the text in a column of its own."""
    head = f"{label:<{indent}}"
    return textwrap.wrap(
        clean(text),
        WIDTH,
        initial_indent=head,
        subsequent_indent=" " * indent,
        break_on_hyphens=False,
    ) or [head.rstrip()]
