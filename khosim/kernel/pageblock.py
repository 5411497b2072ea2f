"""Pageblocks and their migrate types: what kind of allocation each may serve.

Models ``mm/page_alloc.c:get_pfnblock_migratetype`` and ``set_pageblock_migratetype`` @ 7.3 over the
pageblock flags of ``include/linux/pageblock-flags.h``. A pageblock is MOVABLE until it is said to
be something else. Left out: reclaimable, high-atomic and isolated pageblocks, the skip hint.
"""

from __future__ import annotations

import numpy as np

__all__ = ("CMA", "MIGRATE_NAMES", "MOVABLE", "UNMOVABLE", "Pageblocks")

UNMOVABLE = 0
MOVABLE = 1
CMA = 2
MIGRATE_NAMES = ("Unmovable", "Movable", "CMA")

_MANY = 4096


class Pageblocks:
    """The type of every pageblock below ``end_pfn``; a pageblock is ``1 << order`` pages.

    One byte each, committed lazily: a machine whose pageblocks all stay movable costs nothing.
    """

    __slots__ = ("_codes", "_nr_blocks", "order")

    def __init__(self, order: int, end_pfn: int) -> None:
        self.order = order
        # A code is the type xor MOVABLE, so that zeroed memory reads as movable.
        self._codes = np.zeros((end_pfn >> order) + 1, dtype=np.uint8)
        self._nr_blocks = len(self._codes)

    def type_of(self, pfn: int) -> int:
        """``get_pfnblock_migratetype``; MOVABLE beyond the end of memory."""
        index = pfn >> self.order
        return self._codes.item(index) ^ MOVABLE if index < self._nr_blocks else MOVABLE

    def set(self, start_pfn: int, end_pfn: int, migratetype: int) -> None:
        """``change_pageblock_range``: retype the pageblocks that overlap the range."""
        first, last = start_pfn >> self.order, -(-end_pfn >> self.order)
        self._codes[first:last] = migratetype ^ MOVABLE

    def runs(self, start_pfn: int, end_pfn: int) -> list[tuple[int, int, int]]:
        """``[start_pfn, end_pfn)`` cut where the type changes: (start, end, type), ascending."""
        if start_pfn >= end_pfn:
            return []
        order = self.order
        first, last = start_pfn >> order, (end_pfn - 1) >> order
        if first == last:
            return [(start_pfn, end_pfn, self.type_of(start_pfn))]
        codes = self._codes[first : last + 1]
        if len(codes) > _MANY:
            alike = codes.min() == codes.max()
        else:
            raw = codes.tobytes()
            alike = raw.count(raw[:1]) == len(raw)
        if alike:
            return [(start_pfn, end_pfn, self.type_of(start_pfn))]
        changes = (codes[1:] != codes[:-1]).nonzero()[0]
        cuts = ((changes + (first + 1)) << order).tolist()
        return [
            (start, end, self.type_of(start))
            for start, end in zip([start_pfn, *cuts], [*cuts, end_pfn], strict=True)
        ]
