"""Reading fields from a table of a scenario file, with errors that name the place.

Every reader takes a key away from its :class:`Table`; :meth:`Table.done` then refuses what is left
over, and names the known key that comes closest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from typing import Any

from khosim.errors import InputError
from khosim.units import parse_size

__all__ = ("Table", "count_text", "did_you_mean", "size_text")

_MAX_SHOWN_CHARS = 40


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """``"; did you mean 'x'?"``, or the list of what is known."""
    names = list(known)
    close = get_close_matches(word, names, n=1)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known: {', '.join(names)}" if names else ""


def count_text(number: int, noun: str) -> str:
    """``"1 folio"``, ``"4,000 folios"``."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def size_text(len_bytes: int) -> str:
    """Bytes for people: ``"164M"``, ``"1.5G"``, rounded to three digits or so."""
    for suffix, shift in (("T", 40), ("G", 30), ("M", 20), ("K", 10)):
        if len_bytes >= 1 << shift:
            digits = 0 if len_bytes >= 100 << shift else 1
            return f"{len_bytes / (1 << shift):.{digits}f}".removesuffix(".0") + suffix
    return count_text(len_bytes, "byte") if len_bytes else "0"


def _shown(value: object) -> str:
    text = str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= _MAX_SHOWN_CHARS else f"{text[:_MAX_SHOWN_CHARS]}..."


class Table:
    """A TOML table at ``place``; raises :class:`InputError` for anything but a table."""

    __slots__ = ("_known", "_left", "place")

    def __init__(self, value: object, place: str) -> None:
        if not isinstance(value, dict):
            raise InputError(place, f"{_shown(value)} is not a table")
        self.place = place
        self._left: dict[str, Any] = dict(value)
        self._known: list[str] = []

    def error(self, cause: str) -> InputError:
        """The error to raise for this table as a whole."""
        return InputError(self.place, cause)

    def _take(self, key: str) -> Any:
        if key not in self._known:
            self._known.append(key)
        return self._left.pop(key, None)

    def has(self, key: str) -> bool:
        """Whether the key is there and not read yet."""
        if key not in self._known:
            self._known.append(key)
        return key in self._left

    def missing(self, key: str) -> InputError:
        """The error for a key that has to be there; it may be misspelt."""
        close = get_close_matches(key, self._left, n=1)
        if close and close[0] not in self._known:
            return self.error(f"unknown key {_shown(close[0])}; did you mean {key!r}?")
        return self.error(f"{key!r} is missing")

    def done(self) -> None:
        """Refuse keys that nobody asked for."""
        for key in self._left:
            raise self.error(f"unknown key {_shown(key)}{did_you_mean(key, self._known)}")

    def text(self, key: str, default: str | None = None, *, max_chars: int = 2000) -> str:
        """Text; required where ``default`` is None."""
        value = self._take(key)
        if value is None and default is not None:
            return default
        if value is None:
            raise self.missing(key)
        if not isinstance(value, str):
            raise self.error(f"{key}: {_shown(value)} is not text")
        if len(value) > max_chars:
            raise self.error(f"{key}: longer than {max_chars} characters")
        return value

    def name(self, key: str, default: str | None = None) -> str:
        """A short name: letters, digits, ``.``, ``_`` and ``-``."""
        value = self.text(key, default)
        if value and (
            not value.isascii()
            or len(value) > 31
            or not value.replace("-", "").replace("_", "").replace(".", "").isalnum()
        ):
            raise self.error(
                f"{key}: {_shown(value)} is not a name (at most 31 letters, digits and ._-)"
            )
        if not value and default is None:
            raise self.error(f"{key}: the name is empty")
        return value

    def choice(self, key: str, known: Sequence[str], default: str) -> str:
        """One of a few words."""
        value = self.text(key, default)
        if value not in known:
            raise self.error(f"{key}: {_shown(value)}{did_you_mean(value, known)}")
        return value

    def flag(self, key: str, default: bool = False) -> bool:
        """``true`` or ``false``."""
        value = self._take(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.error(f"{key}: {_shown(value)} is neither true nor false")
        return value

    def choice_or_flag(self, key: str, known: Sequence[str], default: bool) -> str:
        """One of a few words; or ``true``, the first of them, or ``false``, which is ""."""
        if isinstance(self._left.get(key), str):
            return self.choice(key, known, known[0])
        return known[0] if self.flag(key, default) else ""

    def integer(self, key: str, default: int | None, low: int, high: int) -> int:
        """A whole number in ``low..high``; required where ``default`` is None."""
        value = self._take(key)
        if value is None and default is not None:
            return default
        if value is None:
            raise self.missing(key)
        return self.whole(key, value, low, high)

    def whole(self, what: str, value: object, low: int, high: int) -> int:
        """``value`` as a whole number in ``low..high``."""
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.error(f"{what}: {_shown(value)} is not a whole number")
        if value < low:
            cause = "is negative" if value < 0 <= low else f"is below {low:,}"
            raise self.error(f"{what}: {_shown(value)} {cause}")
        if value > high:
            raise self.error(f"{what}: {_shown(value)} is above {high:,}")
        return value

    def fraction(self, key: str, default: float) -> float:
        """A number above 0 and at most 1."""
        value = self._take(key)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1:
            raise self.error(f"{key}: {_shown(value)} is not a number above 0 and at most 1")
        return float(value)

    def size(self, key: str, *, low: int = 0, high: int = 1 << 63) -> int | None:
        """A size in bytes, as a number or as text like ``"16G"``; None where it is missing."""
        value = self._take(key)
        return None if value is None else self.bytes_of(key, value, low, high)

    def bytes_of(self, what: str, value: object, low: int = 0, high: int = 1 << 63) -> int:
        """``value`` as a size in bytes in ``low..high``."""
        if isinstance(value, str) and len(value) > _MAX_SHOWN_CHARS:
            raise self.error(f"{what}: {_shown(value)} is not a size like '16G'")
        try:
            size = parse_size(value, what=what)  # type: ignore[arg-type]
        except InputError as error:
            raise self.error(str(error)) from None
        if size < low:
            raise self.error(f"{what}: {_shown(value)} is below {size_text(low)}")
        if size > high:
            raise self.error(f"{what}: {_shown(value)} is above {size_text(high)}")
        return size

    def items(self, key: str, max_items: int) -> list[Any]:
        """A list, empty where it is missing."""
        value = self._take(key)
        if value is None:
            return []
        if not isinstance(value, list):
            raise self.error(f"{key}: {_shown(value)} is not a list")
        if len(value) > max_items:
            raise self.error(f"{key}: {len(value):,} entries are more than {max_items:,}")
        return value

    def any(self, key: str) -> Any:
        """Whatever stands there, for the caller to judge; None where it is missing."""
        return self._take(key)

    def each(self, key: str, max_items: int, read: Callable[[str, Any], Any]) -> list[Any]:
        """``read(what, entry)`` of every entry of a list."""
        entries = self.items(key, max_items)
        return [read(f"{key}, entry {i}", entry) for i, entry in enumerate(entries, 1)]

    def rest(self) -> list[str]:
        """The keys that were not read yet."""
        return list(self._left)
