"""The end of memblock: which pages become free, which stay reserved.

Source: ``mm/memblock.c:memblock_free_all``, ``free_low_memory_core_early``,
``memmap_init_reserved_pages``, ``__free_pages_memory`` @ 7.3.

Here only the ranges are worked out; the page allocator takes them from here. Left out: freeing the
memory map's holes (nothing to do with SPARSEMEM_VMEMMAP) and high memory.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator

from khosim.kernel.memblock_query import MemblockQueries
from khosim.kernel.memblock_regions import (
    MAX_NUMNODES,
    MEMBLOCK_DRIVER_MANAGED,
    MEMBLOCK_HOTPLUG,
    MEMBLOCK_NOMAP,
    MEMBLOCK_RSRV_NOINIT,
    PHYS_ADDR_MAX,
)

__all__ = ("MAX_PAGE_ORDER", "MemblockFree", "split_free_pages", "split_free_runs")

MAX_PAGE_ORDER = 10


def split_free_runs(
    start_pfn: int, end_pfn: int, max_order: int = MAX_PAGE_ORDER
) -> Iterator[tuple[int, int, int]]:
    """Yield ``(pfn, order, nr_blocks)``: the blocks of :func:`split_free_pages`, run by run."""
    while start_pfn < end_pfn:
        order = max_order
        if start_pfn:
            order = min(max_order, (start_pfn & -start_pfn).bit_length() - 1)
        order = min(order, (end_pfn - start_pfn).bit_length() - 1)
        nr_blocks = (end_pfn - start_pfn) >> order if order == max_order else 1
        yield start_pfn, order, nr_blocks
        start_pfn += nr_blocks << order


def split_free_pages(
    start_pfn: int, end_pfn: int, max_order: int = MAX_PAGE_ORDER
) -> Iterator[tuple[int, int]]:
    """Yield ``(pfn, order)`` in the order in which ``__free_pages_memory`` frees blocks.

    Each block is the largest that its alignment, the end and ``max_order`` allow.
    """
    for pfn, order, nr_blocks in split_free_runs(start_pfn, end_pfn, max_order):
        for nth in range(nr_blocks):
            yield pfn + (nth << order), order


class MemblockFree(MemblockQueries):
    """What ``memblock_free_all`` hands to the page allocator."""

    __slots__ = ()

    def free_ranges(self, max_low_pfn: int = PHYS_ADDR_MAX) -> list[tuple[int, int, int]]:
        """Prepare as ``memblock_free_all`` does; return ``(start_pfn, end_pfn, nid)`` it frees.

        Lifts the confinement to scratch, clears hotplug flags, gives reserved regions the node of
        their memory. Ranges come in the order freed, whole pages only, cut at ``max_low_pfn``. Ask
        for :meth:`reserved_ranges` afterwards.
        """
        self.kho_scratch_only = False
        self._setclr_flag(self.memory, 0, PHYS_ADDR_MAX, 0, MEMBLOCK_HOTPLUG)
        self._init_reserved_nodes()
        memory, reserved = self.memory, self.reserved
        shift = self.page_size.bit_length() - 1
        slack = self.page_size - 1
        limit = max_low_pfn << shift
        ranges: list[tuple[int, int, int]] = []
        for base, end, flags, nid in zip(
            memory.base, memory.end, memory.flags, memory.nid, strict=True
        ):
            if flags & (MEMBLOCK_NOMAP | MEMBLOCK_DRIVER_MANAGED):
                continue
            first = bisect_right(reserved.end, base)
            last = bisect_left(reserved.base, end, first)
            starts = [base, *reserved.end[first:last]]
            ends = [*reserved.base[first:last], end]
            if limit < end:
                ends = [min(stop, limit) for stop in ends]
            ranges += [
                (start_pfn, end_pfn, nid)
                for start, stop in zip(starts, ends, strict=True)
                if (start_pfn := (start + slack) >> shift)
                < (end_pfn := stop >> shift)
            ]
        if self.trace is not None:
            self.trace("memblock_free_all", (), len(ranges))
        return ranges

    def reserved_ranges(
        self, *, include_noinit: bool = False, first_online_node: int = 0
    ) -> list[tuple[int, int, int, int]]:
        """``(start_pfn, end_pfn, nid, flags)`` of the pages that get ``PageReserved``.

        NOMAP memory first, then what is reserved, as in ``memmap_init_reserved_pages``; bounds are
        rounded outwards. Regions marked ``MEMBLOCK_RSRV_NOINIT`` are not among them unless
        ``include_noinit``. A region without a node gets that of its first page's memory, or
        ``first_online_node``.
        """
        shift = self.page_size.bit_length() - 1
        slack = self.page_size - 1

        def early_pfn_to_nid(pfn: int) -> int:
            nid = self.memblock_search_pfn_nid(pfn)[0]
            return first_online_node if nid < 0 else nid

        memory, reserved = self.memory, self.reserved
        ranges = [
            (base >> shift, (end + slack) >> shift, nid, flags)
            for base, end, flags, nid in zip(
                memory.base, memory.end, memory.flags, memory.nid, strict=True
            )
            if flags & MEMBLOCK_NOMAP
        ]
        ranges += [
            (
                base >> shift,
                (end + slack) >> shift,
                nid if 0 <= nid < MAX_NUMNODES else early_pfn_to_nid(base >> shift),
                flags,
            )
            for base, end, flags, nid in zip(
                reserved.base, reserved.end, reserved.flags, reserved.nid, strict=True
            )
            if include_noinit or not flags & MEMBLOCK_RSRV_NOINIT
        ]
        return ranges

    def _init_reserved_nodes(self) -> None:
        # A doubling on the way may leave a new region behind the walk: then walk again.
        while True:
            max_reserved = self.reserved.max
            memory = self.memory
            for base, end, nid in zip(memory.base, memory.end, memory.nid, strict=True):
                self._set_node(self.reserved, base, end - base, nid)
            if max_reserved == self.reserved.max:
                return
