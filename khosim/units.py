"""Sizes as people and the kernel write them.

Models ``lib/cmdline.c:memparse`` and ``lib/vsprintf.c:simple_strtoull`` as 7.2 and 7.3 have them.
"""

from __future__ import annotations

from functools import lru_cache

from khosim.errors import InputError

__all__ = ("format_size", "memparse", "parse_size")

_U64 = (1 << 64) - 1
_SUFFIX_SHIFT = {"K": 10, "M": 20, "G": 30, "T": 40, "P": 50, "E": 60}
_DIGITS = "0123456789abcdef"


@lru_cache(maxsize=256)
def memparse(text: str, start: int = 0) -> tuple[int, int]:
    """Parse a number with an optional K, M, G, T, P or E suffix at ``text[start:]``.

    Returns ``(value, end)``: the value in bytes and the index of the first character not consumed.
    Where no digit stands, the value is 0 and ``end == start`` (a lone suffix is not consumed
    either). A prefix ``0x`` or a leading ``0`` (octal) sets the base; what does not fit into 64
    bits becomes 2**64 - 1.
    """
    pos = start
    base = 10
    if text[pos : pos + 1] == "0":
        third = text[pos + 2 : pos + 3].lower()
        if text[pos + 1 : pos + 2].lower() == "x" and third and third in _DIGITS:
            base, pos = 16, pos + 2
        else:
            base = 8
    value = 0
    first = pos
    while pos < len(text):
        digit = _DIGITS.find(text[pos].lower())
        if digit < 0 or digit >= base:
            break
        value = min(value * base + digit, _U64)
        pos += 1
    if pos == first:
        return 0, start
    shift = _SUFFIX_SHIFT.get(text[pos : pos + 1].upper())
    if shift is not None:
        value <<= shift
        pos += 1
    return min(value, _U64), pos


def parse_size(size: int | str, *, what: str = "size") -> int:
    """Bytes for ``size``: an int as it is, or text in full as :func:`memparse` reads it.

    Raises :class:`InputError` that names ``what`` where the text is not wholly a size.
    """
    if isinstance(size, bool) or not isinstance(size, (int, str)):
        raise InputError(what, f"{size!r} is neither a number of bytes nor text like '16G'")
    if isinstance(size, int):
        if size < 0:
            raise InputError(what, f"{size} is negative")
        return size
    value, end = memparse(size)
    if end == 0 or end != len(size):
        raise InputError(what, f"{size!r} is not a size like '16G', '512M' or '0x1000'")
    return value


def format_size(len_bytes: int) -> str:
    """``len_bytes`` for people, exact: ``"16G"``, ``"2560M"``, ``"73"``."""
    for suffix, shift in (("T", 40), ("G", 30), ("M", 20), ("K", 10)):
        if len_bytes and len_bytes % (1 << shift) == 0:
            return f"{len_bytes >> shift}{suffix}"
    return str(len_bytes)
