"""Fingerprints of memory, page by page, so that a report can name the page that changed.

Models nothing of the kernel. A page's digest is a 64-bit sum of its 64-bit words, each folded
onto itself and multiplied by an odd constant of its place: a change of one word always shows, any
other change is missed about once in 2**60. A page of zeros has digest 0 and is not stored, and
memory that the reader knows to be untouched is not read. Equal bytes give equal digests in every
process and on every machine. It is no defence against someone who forges contents on purpose.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from khosim.errors import RamFault

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from numpy.typing import NDArray

    from khosim.checks.reader import Reader

__all__ = ("Digests", "changed_pages", "digest_ranges")

_BATCH_BYTES = 256 << 10  # stays in the second-level cache
_FOLD = np.uint64(32)


@dataclass(frozen=True, slots=True)
class Digests:
    """Digests of the non-zero pages of some ranges.

    ``pages`` maps physical addresses to digests; pages of the ranges that are not in it are zero.
    ``unreadable`` are the ``(start_phys, end_phys)`` ranges where there was no RAM to read.
    """

    page_size: int
    pages: dict[int, int]
    unreadable: tuple[tuple[int, int], ...]


def digest_ranges(
    reader: Reader, ranges: Iterable[tuple[int, int]], page_size: int = 4096
) -> Digests:
    """Digest the ``(start_phys, end_phys)`` ranges, rounded out to whole pages.

    Where the reader offers ``touched_ranges()``, nothing outside of those is read, so ranges may
    be far larger than RAM. Neighbouring ranges are joined; a joined range that is not wholly RAM
    is listed in ``unreadable`` and digested at most in part; nothing is raised.
    """
    batch = _Batch(page_size)
    unreadable: list[tuple[int, int]] = []
    for start, end in _pieces(reader, ranges, page_size):
        low = start
        try:
            while low < end:
                high = min(end, low + _BATCH_BYTES)
                batch.add(low, reader.view(low, high - low))
                low = high
        except RamFault:
            unreadable.append((start, end))
    batch.flush()
    return Digests(page_size, batch.pages, tuple(unreadable))


def _pieces(
    reader: Reader, ranges: Iterable[tuple[int, int]], page_size: int
) -> list[tuple[int, int]]:
    """What of the ranges has to be read, as whole pages; neighbours are joined."""
    source: Callable[[], Sequence[tuple[int, int]]] | None
    source = getattr(reader, "touched_ranges", None)
    joined: list[tuple[int, int]] = []
    begin = past = 0
    for first, last in ranges:
        start, end = first & -page_size, (last + page_size - 1) & -page_size
        if start != past:
            joined.append((begin, past))
            begin = start
        past = end
    joined.append((begin, past))
    if source is None:
        return joined
    touched = source()
    touched_ends = [end for _, end in touched]
    found: list[tuple[int, int]] = []
    for start, end in joined:
        at = bisect_right(touched_ends, start)
        while at < len(touched) and touched[at][0] < end:
            low, high = touched[at]
            found.append(
                (max(start, low & -page_size), min(end, (high + page_size - 1) & -page_size))
            )
            at += 1
    return found


def changed_pages(before: Digests, after: Digests) -> list[int]:
    """Physical addresses of pages whose contents differ between two digests of the same ranges."""
    old, new = before.pages, after.pages
    if old == new:
        return []
    return sorted(phys for phys in old.keys() | new.keys() if old.get(phys, 0) != new.get(phys, 0))


class _Batch:
    """Digests pages many at a time: small ranges are gathered first, large ones go directly."""

    __slots__ = ("gathered", "page_size", "pages", "phys", "room", "weights")

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self.weights = _weights(page_size // 8)
        self.room = _BATCH_BYTES
        self.gathered: list[NDArray[np.uint8]] = []
        self.phys: list[int] = []
        self.pages: dict[int, int] = {}

    def add(self, phys: int, data: NDArray[np.uint8]) -> None:
        """Take the pages in ``data``, which start at ``phys``."""
        len_bytes = data.size
        if len_bytes == self.page_size:
            self.phys.append(phys)
        else:
            addresses = range(phys, phys + len_bytes, self.page_size)
            if len_bytes * 4 >= _BATCH_BYTES:
                self.digest(addresses, data)
                return
            self.phys += addresses
        self.gathered.append(data)
        self.room -= len_bytes
        if self.room <= 0:
            self.flush()

    def flush(self) -> None:
        """Digest what was gathered."""
        if self.gathered:
            self.digest(self.phys, np.concatenate(self.gathered))
            self.room = _BATCH_BYTES
            self.gathered = []
            self.phys = []

    def digest(self, addresses: Sequence[int], data: NDArray[np.uint8]) -> None:
        """Digest whole pages."""
        words = np.ascontiguousarray(data).view("<u8").reshape(len(addresses), -1)
        folded = words >> _FOLD
        np.bitwise_xor(folded, words, out=folded)
        sums = np.einsum("ij,j->i", folded, self.weights)
        pages = self.pages
        for phys, value in zip(addresses, sums.tolist(), strict=True):
            if value:
                pages[phys] = value


@lru_cache(maxsize=4)
def _weights(nr_words: int) -> NDArray[np.uint64]:
    """Odd, well-mixed constants, one for each word of a page (splitmix64 of the index)."""
    x = np.arange(1, nr_words + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    weights: NDArray[np.uint64] = (x ^ (x >> np.uint64(31))) | np.uint64(1)
    weights.flags.writeable = False
    return weights
