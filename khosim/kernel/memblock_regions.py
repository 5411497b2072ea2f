"""A memblock region array: sorted, disjoint regions with attributes.

Models ``struct memblock_type`` with the work that needs nothing but one array: inserting,
splitting, merging, deleting and searching regions.

Source: ``include/linux/memblock.h:memblock_type``, ``mm/memblock.c:memblock_insert_region``,
``memblock_merge_regions``, ``memblock_isolate_range``, ``memblock_search`` @ 7.3.

The kernel scans its arrays; here the columns are plain lists, kept sorted and searched by
bisection, with the same results. Left out: growing (it takes memory from memblock, see
:mod:`khosim.kernel.memblock_core`), the s390 ``physmem`` array, and builds without NUMA.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from typing import TypeAlias

__all__ = (
    "MAX_NUMNODES",
    "MEMBLOCK_DRIVER_MANAGED",
    "MEMBLOCK_HOTPLUG",
    "MEMBLOCK_KHO_SCRATCH",
    "MEMBLOCK_MIRROR",
    "MEMBLOCK_NOMAP",
    "MEMBLOCK_NONE",
    "MEMBLOCK_RSRV_HUGETLB",
    "MEMBLOCK_RSRV_KERN",
    "MEMBLOCK_RSRV_NOINIT",
    "NUMA_NO_NODE",
    "PHYS_ADDR_MAX",
    "REGION_LEN_BYTES",
    "Region",
    "RegionArray",
    "numa_valid_node",
)

MEMBLOCK_NONE = 0x0
MEMBLOCK_HOTPLUG = 0x1
MEMBLOCK_MIRROR = 0x2
MEMBLOCK_NOMAP = 0x4
MEMBLOCK_DRIVER_MANAGED = 0x8
MEMBLOCK_RSRV_NOINIT = 0x10
MEMBLOCK_RSRV_KERN = 0x20
MEMBLOCK_KHO_SCRATCH = 0x40
MEMBLOCK_RSRV_HUGETLB = 0x80

PHYS_ADDR_MAX = (1 << 64) - 1
NUMA_NO_NODE = -1
MAX_NUMNODES = 64
REGION_LEN_BYTES = 24  # sizeof(struct memblock_region): base, size, flags, nid

_MANY = 64  # regions from which rebuilding a whole stretch beats deleting one by one

Region: TypeAlias = tuple[int, int, int, int]
"""``(base, size, flags, nid)`` as the kernel stores it."""


def numa_valid_node(nid: int) -> bool:
    """Whether ``nid`` names a node (``include/linux/numa.h:numa_valid_node``)."""
    return 0 <= nid < MAX_NUMNODES


class RegionArray:
    """One of memblock's two arrays, in four columns sorted by address.

    ``base``, ``end`` (bytes, half-open), ``flags`` and ``nid`` run in parallel. ``max`` is how many
    regions the kernel's array can hold. ``total_size`` is the kernel's running sum, which
    ``memblock_trim_memory`` leaves stale. ``array_phys`` is where the kernel's array lies once it
    was doubled, 0 while it is the static one.
    """

    __slots__ = ("array_phys", "base", "end", "flags", "max", "name", "nid", "total_size")

    def __init__(self, name: str, max_regions: int) -> None:
        self.name = name
        self.max = max_regions
        self.base: list[int] = []
        self.end: list[int] = []
        self.flags: list[int] = []
        self.nid: list[int] = []
        self.total_size = 0
        self.array_phys = 0

    @property
    def cnt(self) -> int:
        """Number of regions."""
        return len(self.base)

    def rows(self) -> list[Region]:
        """The regions as ``(base, size, flags, nid)``, lowest first."""
        return [
            (base, end - base, flags, nid)
            for base, end, flags, nid in zip(self.base, self.end, self.flags, self.nid, strict=True)
        ]

    def search(self, addr: int) -> int:
        """Index of the region that holds byte ``addr``, or -1 (``memblock_search``)."""
        idx = bisect_right(self.base, addr) - 1
        return idx if idx >= 0 and addr < self.end[idx] else -1

    def overlaps(self, base: int, end: int) -> bool:
        """Whether a region reaches strictly below ``end`` and above ``base``."""
        idx = bisect_right(self.end, base)
        return idx < len(self.base) and self.base[idx] < end

    def set_only(self, base: int, end: int, nid: int, flags: int) -> None:
        """Make [base, end) the only region, as the kernel fills an empty array."""
        self.base.append(base)
        self.end.append(end)
        self.flags.append(flags)
        self.nid.append(nid)
        self.total_size = end - base

    def insert_merged(self, idx: int, base: int, end: int, nid: int, flags: int) -> None:
        """Insert [base, end), which overlaps nothing, at ``idx`` and merge it with what it touches.

        The same as ``memblock_insert_region`` and ``memblock_merge_regions`` around it.
        """
        bases, ends, all_flags, nids = self.base, self.end, self.flags, self.nid
        self.total_size += end - base
        joins_next = (
            idx < len(bases) and bases[idx] == end and all_flags[idx] == flags and nids[idx] == nid
        )
        prev = idx - 1
        if idx and ends[prev] == base and all_flags[prev] == flags and nids[prev] == nid:
            if joins_next:
                ends[prev] = ends[idx]
                self._delete(idx)
            else:
                ends[prev] = end
        elif joins_next:
            bases[idx] = base
        else:
            bases.insert(idx, base)
            ends.insert(idx, end)
            all_flags.insert(idx, flags)
            nids.insert(idx, nid)

    def fill(
        self, idx: int, last: int, base: int, end: int, nid: int, flags: int
    ) -> tuple[RegionArray, int, int]:
        """The regions ``idx`` to ``last``, and between them what of [base, end) they leave free.

        Returns the stretch as an array of its own, and the indices in ``self`` from the first
        inserted part to behind the last one (both -1 where nothing is free).
        """
        piece = RegionArray(self.name, self.max)
        first_new = end_new = -1
        cursor = base
        for k in range(idx, last + 1):
            upto = end if k == last else self.base[k]
            if upto > cursor:
                end_new = idx + len(piece.base) + 1
                if first_new < 0:
                    first_new = end_new - 1
                piece.base.append(cursor)
                piece.end.append(upto)
                piece.flags.append(flags)
                piece.nid.append(nid)
                piece.total_size += upto - cursor
            if k < last:
                piece.base.append(self.base[k])
                piece.end.append(self.end[k])
                piece.flags.append(self.flags[k])
                piece.nid.append(self.nid[k])
                cursor = self.end[k]
        return piece, first_new, end_new

    def splice(self, idx: int, last: int, piece: RegionArray) -> None:
        """Put the columns of ``piece`` in the place of the regions ``idx`` to ``last``."""
        self.base[idx:last] = piece.base
        self.end[idx:last] = piece.end
        self.flags[idx:last] = piece.flags
        self.nid[idx:last] = piece.nid
        self.total_size += piece.total_size

    def isolate(self, base: int, end: int) -> tuple[int, int]:
        """Split the regions that cross ``base`` or ``end``; the array has room for two more.

        Returns the indices ``(start_rgn, end_rgn)`` of the regions inside [base, end), (0, 0) where
        there is none.
        """
        start_rgn = bisect_right(self.end, base)
        end_rgn = bisect_left(self.base, end, start_rgn)
        if start_rgn >= end_rgn:
            return 0, 0
        if self.base[start_rgn] < base:
            self._split(start_rgn, base)
            start_rgn += 1
            end_rgn += 1
        if self.end[end_rgn - 1] > end:
            self._split(end_rgn - 1, end)
        return start_rgn, end_rgn

    def remove(self, start_rgn: int, end_rgn: int) -> None:
        """Delete the regions ``start_rgn`` to ``end_rgn`` and take them off ``total_size``."""
        span = slice(start_rgn, end_rgn)
        self.total_size -= sum(self.end[span]) - sum(self.base[span])
        del self.base[span], self.end[span], self.flags[span], self.nid[span]

    def merge(self, start_rgn: int, end_rgn: int) -> None:
        """Merge touching regions of equal flags and node from ``start_rgn`` - 1 to ``end_rgn``."""
        bases, ends, flags, nids = self.base, self.end, self.flags, self.nid
        idx = start_rgn - 1 if start_rgn else 0
        last = min(end_rgn, len(bases) - 1)
        if last - idx > _MANY:
            self._merge_many(idx, last)
            return
        while idx < last:
            nxt = idx + 1
            if ends[idx] == bases[nxt] and flags[idx] == flags[nxt] and nids[idx] == nids[nxt]:
                ends[idx] = ends[nxt]
                self._delete(nxt)
                last -= 1
            else:
                idx = nxt

    def _merge_many(self, first: int, last: int) -> None:
        # The same over a long stretch: find the seams that vanish, then rebuild the columns once.
        bases, ends, flags, nids = self.base, self.end, self.flags, self.nid
        seams = [
            k
            for k, (end, base) in enumerate(
                zip(ends[first:last], bases[first + 1 : last + 1], strict=True), first + 1
            )
            if end == base and flags[k - 1] == flags[k] and nids[k - 1] == nids[k]
        ]
        if not seams:
            return
        gone = set(seams)
        stay = [k for k in range(first, last + 1) if k not in gone]
        span = slice(first, last + 1)
        stops = [k - 1 for k in stay[1:]]
        stops.append(last)
        bases[span] = [bases[k] for k in stay]
        ends[span] = [ends[k] for k in stops]
        flags[span] = [flags[k] for k in stay]
        nids[span] = [nids[k] for k in stay]

    def _split(self, idx: int, addr: int) -> None:
        self.base.insert(idx + 1, addr)
        self.end.insert(idx, addr)
        self.flags.insert(idx, self.flags[idx])
        self.nid.insert(idx, self.nid[idx])

    def _delete(self, idx: int) -> None:
        del self.base[idx], self.end[idx], self.flags[idx], self.nid[idx]
