"""Text for a terminal: what a file or a machine's RAM holds must not steer it."""

from __future__ import annotations

__all__ = ("printable",)


def printable(text: str) -> str:
    r"""``text`` with each control character but the newline as ``\x1b`` or the like."""
    if text.replace("\n", "").isprintable():
        return text
    return "".join(
        char if char == "\n" or char.isprintable() else char.encode("unicode_escape").decode()
        for char in text
    )
