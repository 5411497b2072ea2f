"""Ranges of pages as the blocks that KHO marks, and reserved ranges as memblock's array of regions.

Models the loop of ``__kho_preserve_pages`` and the merging of ``memblock_add_range``. Left out: a
block is not split where nodes meet, and regions of different flags and nodes merge all the same.
"""

from __future__ import annotations

__all__ = ("Regions", "count_blocks")


def count_blocks(pfn: int, nr_pages: int) -> int:
    """How many naturally aligned blocks, each as large as it can be, the range consists of."""
    end, count = pfn + nr_pages, 0
    while pfn < end:
        fits = (end - pfn).bit_length() - 1
        order = min(fits, (pfn & -pfn).bit_length() - 1) if pfn else fits
        pfn += 1 << order
        count += 1
    return count


class Regions:
    """Ranges that do not overlap; :attr:`count` is how many are left when neighbours merge."""

    __slots__ = ("_ends", "_starts", "count")

    def __init__(self) -> None:
        self._starts: set[int] = set()
        self._ends: set[int] = set()
        self.count = 0

    def add(self, start: int, end: int) -> None:
        """One more range: of itself, at the end of one, in front of one, or between two."""
        self.count += 1
        if start in self._ends:
            self._ends.remove(start)
            self.count -= 1
        else:
            self._starts.add(start)
        if end in self._starts:
            self._starts.remove(end)
            self.count -= 1
        else:
            self._ends.add(end)
