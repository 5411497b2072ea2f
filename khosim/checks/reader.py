"""How the checkers reach physical memory, and how they say that something there is wrong.

Models nothing of the kernel: a :class:`Reader` is any object that hands out bytes of RAM by
physical address. :class:`PageImage` is one over loose pages, such as those of a capture or a dump.

A decoder never raises on what it reads. It notes a :class:`Problem` in a :class:`ProblemLog`,
which keeps a bounded number of them, and goes on with what is left.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from khosim.errors import InputError, RamFault

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

__all__ = ("PAGE_SIZES", "PageImage", "Problem", "ProblemLog", "Reader", "page_shift")

PAGE_SIZES = (4096, 16384, 65536)

_MAX_PER_CODE = 25


class Reader(Protocol):
    """Physical memory to read from.

    Both methods take a physical address and a length in bytes and raise
    :class:`khosim.errors.RamFault` where any byte of that range is no RAM. A reader may also offer
    ``touched_ranges()``: the sorted, disjoint ``(start_phys, end_phys)`` ranges outside of which
    RAM is known to be all zero.
    """

    def read(self, phys: int, len_bytes: int, /) -> bytes:
        """Copy of the bytes at ``[phys, phys + len_bytes)``."""

    def view(self, phys: int, len_bytes: int, /) -> NDArray[np.uint8]:
        """Read-only array over the bytes at ``[phys, phys + len_bytes)``."""


class Problem(NamedTuple):
    """Something in handed-over memory that cannot be what a kernel wrote.

    ``code`` is a stable identifier (``"radix-unaligned"``), ``phys`` the address of the bytes that
    are wrong, ``detail`` says what is wrong with them. ``path`` leads there from the handover's
    root (``"/LUO/sessions[1]/files[0]"``), and ``expected`` says what should be there; both may be
    empty.
    """

    code: str
    phys: int
    detail: str
    path: str = ""
    expected: str = ""

    def __str__(self) -> str:
        return f"{self.phys:#x}: {self.detail} [{self.code}]"


class ProblemLog:
    """Collects problems, up to a limit of each kind, and counts the rest."""

    __slots__ = ("_counts", "_items", "_left_out")

    def __init__(self) -> None:
        self._items: list[Problem] = []
        self._counts: dict[str, int] = {}
        self._left_out = 0

    def add(self, code: str, phys: int, detail: str, path: str = "", expected: str = "") -> None:
        """Note one problem."""
        count = self._counts.get(code, 0)
        if count < _MAX_PER_CODE:
            self._counts[code] = count + 1
            self._items.append(Problem(code, phys, detail, path, expected))
        else:
            self._left_out += 1

    def extend(self, problems: tuple[Problem, ...], path: str = "") -> None:
        """Note problems that another decoder found; ``path`` leads to what it decoded."""
        for code, phys, detail, inner, expected in problems:
            joined = (path.rstrip("/") + inner).rstrip("/")
            self.add(code, phys, detail, joined or ("/" if path or inner else ""), expected)

    def done(self) -> tuple[Problem, ...]:
        """What was noted, in order; the last entry counts what was left out, if anything was."""
        if self._left_out:
            first = self._items[0]
            more = Problem("more", first.phys, f"{self._left_out} more problems not listed")
            return (*self._items, more)
        return tuple(self._items)


def page_shift(page_size: int) -> int:
    """``PAGE_SHIFT`` for a page size in bytes; :class:`InputError` for sizes no kernel has."""
    if page_size not in PAGE_SIZES:
        raise InputError("page_size", f"{page_size} is not one of 4096, 16384, 65536")
    return page_size.bit_length() - 1


class PageImage:
    """RAM of which only some pages are known: page frame number -> ``page_size`` bytes.

    Everything else counts as no RAM. The mapping is used as it is, so pages may be changed, added
    and removed between reads.
    """

    __slots__ = ("_shift", "page_size", "pages")

    def __init__(self, pages: Mapping[int, bytes | bytearray], page_size: int) -> None:
        self.pages = pages
        self.page_size = page_size
        self._shift = page_shift(page_size)

    def read(self, phys: int, len_bytes: int, /) -> bytes:
        """Copy of the bytes at ``[phys, phys + len_bytes)``; raises :class:`RamFault`."""
        if phys < 0 or len_bytes < 0:
            raise RamFault(phys, len_bytes, "negative address or length")
        shift = self._shift
        first = phys >> shift
        offset = phys - (first << shift)
        page = self.pages.get(first)
        if page is not None and offset + len_bytes <= self.page_size:
            return bytes(page[offset : offset + len_bytes])
        end = phys + len_bytes
        parts: list[bytes | bytearray] = []
        for pfn in range(first, (end + self.page_size - 1) >> shift):
            page = self.pages.get(pfn)
            if page is None:
                raise RamFault(phys, len_bytes, f"page {pfn:#x} is not known")
            parts.append(page)
        return b"".join(parts)[offset : offset + len_bytes]

    def view(self, phys: int, len_bytes: int, /) -> NDArray[np.uint8]:
        """Read-only array over the bytes at ``[phys, phys + len_bytes)``; a copy here."""
        return np.frombuffer(self.read(phys, len_bytes), dtype=np.uint8)
