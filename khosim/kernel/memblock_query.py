"""Asking memblock: sizes, addresses, walks, and the dump that ``memblock=debug`` prints.

Source: ``mm/memblock.c:memblock_phys_mem_size`` to ``memblock_is_region_reserved``,
``memblock_validate_numa_coverage``, ``__next_mem_pfn_range``, ``__memblock_dump_all`` and the
``for_each_*`` macros of ``include/linux/memblock.h`` @ 7.3.

Left out: the debugfs files. Queries are not traced: they change nothing.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from itertools import islice

from khosim.kernel.memblock_alloc import MemblockAlloc
from khosim.kernel.memblock_iter import free_ranges, free_ranges_reverse, memory_ranges
from khosim.kernel.memblock_regions import (
    MEMBLOCK_DRIVER_MANAGED,
    MEMBLOCK_HOTPLUG,
    MEMBLOCK_NOMAP,
    MEMBLOCK_NONE,
    MEMBLOCK_RSRV_HUGETLB,
    MEMBLOCK_RSRV_KERN,
    NUMA_NO_NODE,
    PHYS_ADDR_MAX,
    RegionArray,
    numa_valid_node,
)

__all__ = ("MemblockQueries",)

_MIB = 1 << 20


class MemblockQueries(MemblockAlloc):
    """Every call that only looks. Addresses and sizes are bytes."""

    __slots__ = ()

    # Sizes

    def memblock_phys_mem_size(self) -> int:
        """Bytes of memory as the kernel counts them (stale after ``memblock_trim_memory``)."""
        return self.memory.total_size & PHYS_ADDR_MAX

    def memblock_reserved_size(self) -> int:
        """Bytes reserved."""
        return self.reserved.total_size & PHYS_ADDR_MAX

    def memblock_reserved_kern_size(self, limit: int, nid: int = NUMA_NO_NODE) -> int:
        """Bytes below ``limit`` reserved as the kernel's own, on ``nid`` if it names a node."""
        return self._flagged_size(limit, nid, MEMBLOCK_RSRV_KERN)

    def memblock_reserved_hugetlb_size(self, limit: int, nid: int = NUMA_NO_NODE) -> int:
        """Bytes below ``limit`` reserved for huge pages, on ``nid`` if it names a node."""
        return self._flagged_size(limit, nid, MEMBLOCK_RSRV_HUGETLB)

    def memblock_estimated_nr_free_pages(self) -> int:
        """Pages of memory less those reserved as the kernel's own."""
        kern = self.memblock_reserved_kern_size(PHYS_ADDR_MAX)
        return ((self.memory.total_size - kern) & PHYS_ADDR_MAX) // self.page_size

    def _flagged_size(self, limit: int, nid: int, flag: int) -> int:
        array = self.reserved
        any_nid = not numa_valid_node(nid)
        count = bisect_right(array.base, limit)
        total = sum(
            end - base
            for base, end, flags, node in islice(
                zip(array.base, array.end, array.flags, array.nid, strict=True), count
            )
            if flags & flag and (any_nid or node == nid)
        )
        last = count - 1
        cut = count and array.end[last] > limit and array.flags[last] & flag
        if cut and (any_nid or array.nid[last] == nid):
            total -= array.end[last] - limit
        return total

    # Addresses

    def memblock_start_of_DRAM(self) -> int:  # noqa: N802
        """Lowest address of memory, 0 without memory."""
        return self.memory.base[0] if self.memory.base else 0

    def memblock_end_of_DRAM(self) -> int:  # noqa: N802
        """First address behind memory; 0 without memory, where the kernel reads astray."""
        return self.memory.end[-1] if self.memory.end else 0

    def memblock_get_current_limit(self) -> int:
        """The limit set by ``memblock_set_current_limit``."""
        return self.current_limit

    def memblock_is_memory(self, addr: int) -> bool:
        """Whether ``addr`` is memory."""
        return self.memory.search(addr) != -1

    def memblock_is_map_memory(self, addr: int) -> bool:
        """Whether ``addr`` is memory in the direct map."""
        idx = self.memory.search(addr)
        return idx != -1 and not self.memory.flags[idx] & MEMBLOCK_NOMAP

    def memblock_is_reserved(self, addr: int) -> bool:
        """Whether ``addr`` is reserved."""
        return self.reserved.search(addr) != -1

    def memblock_is_region_memory(self, base: int, size: int) -> bool:
        """Whether [base, + size) lies in one single memory region."""
        idx = self.memory.search(base)
        return idx != -1 and self.memory.end[idx] >= min(base + size, PHYS_ADDR_MAX)

    def memblock_is_region_reserved(self, base: int, size: int) -> bool:
        """Whether [base, + size) meets a reserved region."""
        return self.memblock_overlaps_region(self.reserved, base, size)

    def memblock_overlaps_region(self, array: RegionArray, base: int, size: int) -> bool:
        """Whether [base, + size) meets a region of ``array``; size 0 asks for a point inside."""
        return array.overlaps(base, min(base + size, PHYS_ADDR_MAX))

    def memblock_search_pfn_nid(self, pfn: int) -> tuple[int, int, int]:
        """``(nid, start_pfn, end_pfn)`` of the memory region around ``pfn``.

        ``(NUMA_NO_NODE, 0, 0)`` where there is none.
        """
        idx = self.memory.search(pfn * self.page_size & PHYS_ADDR_MAX)
        if idx == -1:
            return NUMA_NO_NODE, 0, 0
        memory = self.memory
        return (
            memory.nid[idx],
            memory.base[idx] // self.page_size,
            memory.end[idx] // self.page_size,
        )

    def memblock_validate_numa_coverage(self, threshold_bytes: int) -> bool:
        """Whether no more than ``threshold_bytes`` of memory lack a node."""
        nr_pages = sum(
            end_pfn - start_pfn
            for start_pfn, end_pfn, nid in self.for_each_mem_pfn_range(NUMA_NO_NODE)
            if not numa_valid_node(nid)
        )
        lost = nr_pages * self.page_size & PHYS_ADDR_MAX
        if lost <= threshold_bytes:
            return True
        total = self.memblock_phys_mem_size()
        self._say(f"NUMA: no nodes coverage for {lost // _MIB}MB of {total // _MIB}MB RAM")
        return False

    # Walks

    def for_each_free_mem_range(
        self, nid: int = NUMA_NO_NODE, flags: int = MEMBLOCK_NONE, reverse: bool = False
    ) -> Iterator[tuple[int, int, int]]:
        """Yield ``(start, end, nid)`` of memory that is not reserved; empty ranges occur."""
        walk = free_ranges_reverse if reverse else free_ranges
        return walk(self.memory, self.reserved, nid, flags, movable_node=self.movable_node)

    def for_each_mem_range(self, reverse: bool = False) -> Iterator[tuple[int, int]]:
        """Yield ``(start, end)`` of all memory but NOMAP regions."""
        flags = MEMBLOCK_HOTPLUG | MEMBLOCK_DRIVER_MANAGED
        for start, end, _nid in memory_ranges(
            self.memory, NUMA_NO_NODE, flags, movable_node=self.movable_node, reverse=reverse
        ):
            yield start, end

    def for_each_reserved_mem_range(self) -> Iterator[tuple[int, int]]:
        """Yield ``(start, end)`` of all that is reserved."""
        idx = 0
        while idx < self.reserved.cnt:
            yield self.reserved.base[idx], self.reserved.end[idx]
            idx += 1

    def for_each_mem_pfn_range(self, nid: int = NUMA_NO_NODE) -> Iterator[tuple[int, int, int]]:
        """Yield ``(start_pfn, end_pfn, nid)`` of the whole pages of memory, on ``nid`` if valid."""
        memory, page_size = self.memory, self.page_size
        any_nid = not numa_valid_node(nid)
        idx = 0
        while idx < len(memory.base):
            start_pfn = ((memory.base[idx] + page_size - 1) & PHYS_ADDR_MAX) // page_size
            end_pfn = memory.end[idx] // page_size
            node = memory.nid[idx]
            idx += 1
            if start_pfn < end_pfn and (any_nid or node == nid):
                yield start_pfn, end_pfn, node

    # The dump

    def memblock_dump_all(self) -> list[str]:
        """The lines of the kernel's dump, without the log's prefix."""
        sizes = self.memblock_phys_mem_size(), self.memblock_reserved_size()
        lines = [
            "MEMBLOCK configuration:",
            f" memory size = 0x{sizes[0]:016x} reserved size = 0x{sizes[1]:016x}",
        ]
        for array in (self.memory, self.reserved):
            lines.append(f" {array.name}.cnt  = {array.cnt:#x}")
            for idx, (base, size, flags, nid) in enumerate(array.rows()):
                node = f" on node {nid}" if numa_valid_node(nid) else ""
                lines.append(
                    f" {array.name}[{idx:#x}]\t[0x{base:016x}-0x{base + size - 1:016x}],"
                    f" 0x{size:016x} bytes{node} flags: {flags:#x}"
                )
        return lines
