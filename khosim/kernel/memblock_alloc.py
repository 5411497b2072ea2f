"""Allocating from memblock.

Source: ``mm/memblock.c:memblock_alloc_range_nid``, ``memblock_phys_alloc_range``,
``memblock_alloc_internal``, ``memblock_alloc_hugetlb`` and their callers in
``include/linux/memblock.h`` @ 7.3.

Every call returns a physical address, 0 for failure. Zeroing is the caller's part: it owns the RAM.
Left out: the detour into the slab allocator for allocations made too late.
"""

from __future__ import annotations

from collections.abc import Callable

from khosim.kernel.memblock_arrays import MemblockArrays
from khosim.kernel.memblock_core import MEMBLOCK_ALLOC_ACCESSIBLE
from khosim.kernel.memblock_regions import (
    MAX_NUMNODES,
    MEMBLOCK_KHO_SCRATCH,
    MEMBLOCK_MIRROR,
    MEMBLOCK_NONE,
    MEMBLOCK_RSRV_HUGETLB,
    MEMBLOCK_RSRV_KERN,
    NUMA_NO_NODE,
    numa_valid_node,
)

__all__ = ("ARCH_LOW_ADDRESS_LIMIT", "MemblockAlloc")

ARCH_LOW_ADDRESS_LIMIT = 0xFFFFFFFF


class MemblockAlloc(MemblockArrays):
    """Every call that allocates. Sizes, alignments and limits are bytes in 0 to 2**64 - 1."""

    __slots__ = ()

    def memblock_alloc_range_nid(
        self, size: int, align: int, start: int, end: int, nid: int, exact_nid: bool
    ) -> int:
        """Allocate in [start, end), on node ``nid`` if it names one.

        ``exact_nid`` forbids other nodes. ``end`` may be ``MEMBLOCK_ALLOC_ACCESSIBLE``.
        """
        found = self._alloc_range_nid(size, align, start, end, nid, exact_nid)
        if self.trace is not None:
            self.trace("memblock_alloc_range_nid", (size, align, start, end, nid, exact_nid), found)
        return found

    def memblock_phys_alloc_range(self, size: int, align: int, start: int, end: int) -> int:
        """Allocate in [start, end) on any node."""
        found = self._alloc_range_nid(size, align, start, end, NUMA_NO_NODE, False)
        if self.trace is not None:
            self.trace("memblock_phys_alloc_range", (size, align, start, end), found)
        return found

    def memblock_phys_alloc(self, size: int, align: int) -> int:
        """Allocate anywhere below the current limit."""
        return self.memblock_phys_alloc_range(size, align, 0, MEMBLOCK_ALLOC_ACCESSIBLE)

    def memblock_phys_alloc_try_nid(self, size: int, align: int, nid: int) -> int:
        """Allocate on node ``nid``, elsewhere if it is full."""
        found = self._alloc_range_nid(size, align, 0, MEMBLOCK_ALLOC_ACCESSIBLE, nid, False)
        if self.trace is not None:
            self.trace("memblock_phys_alloc_try_nid", (size, align, nid), found)
        return found

    def memblock_alloc_internal(
        self, size: int, align: int, min_addr: int, max_addr: int, nid: int, exact_nid: bool
    ) -> int:
        """Allocate in [min_addr, max_addr), below ``min_addr`` if there is no room above it."""
        found = self._alloc_internal(size, align, min_addr, max_addr, nid, exact_nid)
        if self.trace is not None:
            arguments = (size, align, min_addr, max_addr, nid, exact_nid)
            self.trace("memblock_alloc_internal", arguments, found)
        return found

    def memblock_alloc_exact_nid_raw(
        self, size: int, align: int, min_addr: int, max_addr: int, nid: int
    ) -> int:
        """Allocate on node ``nid`` and nowhere else."""
        found = self._alloc_internal(size, align, min_addr, max_addr, nid, True)
        if self.trace is not None:
            arguments = (size, align, min_addr, max_addr, nid)
            self.trace("memblock_alloc_exact_nid_raw", arguments, found)
        return found

    def memblock_alloc_try_nid_raw(
        self, size: int, align: int, min_addr: int, max_addr: int, nid: int
    ) -> int:
        """Allocate on node ``nid``, elsewhere if it is full; the caller does not zero."""
        found = self._alloc_internal(size, align, min_addr, max_addr, nid, False)
        if self.trace is not None:
            arguments = (size, align, min_addr, max_addr, nid)
            self.trace("memblock_alloc_try_nid_raw", arguments, found)
        return found

    def memblock_alloc_try_nid(
        self, size: int, align: int, min_addr: int, max_addr: int, nid: int
    ) -> int:
        """Allocate on node ``nid``, elsewhere if it is full; the caller zeroes the bytes."""
        found = self._alloc_internal(size, align, min_addr, max_addr, nid, False)
        if self.trace is not None:
            arguments = (size, align, min_addr, max_addr, nid)
            self.trace("memblock_alloc_try_nid", arguments, found)
        return found

    def memblock_alloc(self, size: int, align: int) -> int:
        """Allocate anywhere below the current limit; the caller zeroes the bytes."""
        return self.memblock_alloc_try_nid(size, align, 0, MEMBLOCK_ALLOC_ACCESSIBLE, NUMA_NO_NODE)

    def memblock_alloc_raw(self, size: int, align: int) -> int:
        """Allocate anywhere below the current limit; the caller does not zero."""
        return self.memblock_alloc_try_nid_raw(
            size, align, 0, MEMBLOCK_ALLOC_ACCESSIBLE, NUMA_NO_NODE
        )

    def memblock_alloc_or_panic(self, size: int, align: int, func: str) -> int:
        """:meth:`memblock_alloc` for the kernel function ``func``, or :class:`KernelPanic`."""
        found = self.memblock_alloc(size, align)
        if not found:
            raise self._panic(f"{func}: Failed to allocate 0x{size:016x} bytes")
        return found

    def memblock_alloc_from(self, size: int, align: int, min_addr: int) -> int:
        """Allocate above ``min_addr``, below it if there is no room."""
        return self.memblock_alloc_try_nid(
            size, align, min_addr, MEMBLOCK_ALLOC_ACCESSIBLE, NUMA_NO_NODE
        )

    def memblock_alloc_low(self, size: int, align: int) -> int:
        """Allocate below 4 GiB."""
        return self.memblock_alloc_try_nid(size, align, 0, ARCH_LOW_ADDRESS_LIMIT, NUMA_NO_NODE)

    def memblock_alloc_node(self, size: int, align: int, nid: int) -> int:
        """Allocate on node ``nid``, elsewhere if it is full; the caller zeroes the bytes."""
        return self.memblock_alloc_try_nid(size, align, 0, MEMBLOCK_ALLOC_ACCESSIBLE, nid)

    def memblock_alloc_hugetlb(
        self, size: int, nid: int, exact_nid: bool, scratch_overlap: Callable[[int, int], bool]
    ) -> int:
        """Allocate a huge page of ``size`` bytes, outside KHO scratch.

        ``scratch_overlap(phys, len_bytes)`` is the kernel's ``kho_scratch_overlap``. Never uses the
        preference for mirrored memory.
        """
        found = self._alloc_hugetlb(size, nid, exact_nid, scratch_overlap)
        if self.trace is not None:
            self.trace("memblock_alloc_hugetlb", (size, nid, exact_nid), found)
        return found

    def _alloc_range_nid(
        self, size: int, align: int, start: int, end: int, nid: int, exact_nid: bool
    ) -> int:
        if self.kho_scratch_only:
            flags = MEMBLOCK_KHO_SCRATCH
        else:
            flags = MEMBLOCK_MIRROR if self.system_has_some_mirror else MEMBLOCK_NONE
        if not align:
            self._say("memblock_alloc_range_nid: dump_stack: no alignment")
            align = self.smp_cache_bytes
        reserved = self.reserved
        while True:
            found = self._find_node(size, align, start, end, nid, flags)
            if found and not self._add_range(reserved, found, size, nid, MEMBLOCK_RSRV_KERN):
                break
            if not exact_nid and 0 <= nid < MAX_NUMNODES:
                found = self._find_node(size, align, start, end, NUMA_NO_NODE, flags)
                if found and not self._add_range(
                    reserved, found, size, NUMA_NO_NODE, MEMBLOCK_RSRV_KERN
                ):
                    break
            if not flags & MEMBLOCK_MIRROR:
                return 0
            flags &= ~MEMBLOCK_MIRROR
            self._say(f"Could not allocate 0x{size:016x} bytes of mirrored memory")
        if size:
            self.allocations.append((found, size))
        return found

    def _alloc_internal(
        self, size: int, align: int, min_addr: int, max_addr: int, nid: int, exact_nid: bool
    ) -> int:
        if max_addr > self.current_limit:
            max_addr = self.current_limit
        found = self._alloc_range_nid(size, align, min_addr, max_addr, nid, exact_nid)
        if not found and min_addr:
            found = self._alloc_range_nid(size, align, 0, max_addr, nid, exact_nid)
        return found

    def _alloc_hugetlb(
        self, size: int, nid: int, exact_nid: bool, scratch_overlap: Callable[[int, int], bool]
    ) -> int:
        flags = self._choose_flags() & ~MEMBLOCK_MIRROR
        start, end = 0, MEMBLOCK_ALLOC_ACCESSIBLE
        while True:
            addr = self._find_node(size, size, start, end, nid, flags)
            if not addr:
                if exact_nid or not numa_valid_node(nid):
                    return 0
                nid, start, end = NUMA_NO_NODE, 0, MEMBLOCK_ALLOC_ACCESSIBLE
            elif not scratch_overlap(addr, size):
                break
            elif self.bottom_up:
                start = addr + size
            else:
                end = addr
        huge = MEMBLOCK_RSRV_KERN | MEMBLOCK_RSRV_HUGETLB
        if self._add_range(self.reserved, addr, size, nid, huge):
            return 0
        self.allocations.append((addr, size))
        return addr
