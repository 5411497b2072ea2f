"""Zones and the memory they are given at boot.

Models ``mm/mm_init.c`` (``free_area_init``, ``defer_init``, ``deferred_init_memmap``) with the zone
lists of ``mm/page_alloc.c:build_zonelists`` @ 7.3. With deferred struct-page initialisation a
node's upper memory arrives late in boot.

Left out: ZONE_MOVABLE and ZONE_DEVICE, ``deferred_grow_zone`` (an allocation before the late memory
is there goes to the next zone or fails), node distances (nodes count as equally far, so the next
higher one comes first).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from itertools import islice

from khosim.kernel.arch import Arch
from khosim.kernel.buddy import Zone
from khosim.kernel.pageblock import CMA, MOVABLE, Pageblocks

__all__ = ("ZoneLayout",)

_NO_LIMIT = 1 << 62


class ZoneLayout:
    """The zones of one kernel and which pages are theirs; pfns throughout."""

    __slots__ = (
        "_cma_ranges",
        "_piece_starts",
        "_pieces",
        "_zonelists",
        "arch",
        "cma_areas",
        "deferred",
        "first_deferred_pfn",
        "keeps_cma",
        "pageblocks",
        "uninitialised",
        "zones",
    )

    def __init__(self, arch: Arch) -> None:
        self.arch = arch
        self.zones: list[Zone] = []
        self.pageblocks = Pageblocks(arch.pageblock_order, 0)
        self.deferred: list[tuple[int, int, int]] = []
        """Free ranges whose struct pages are initialised only at ``page_alloc_init_late``."""
        self.first_deferred_pfn: dict[int, int] = {}
        """Per node: ``pgdat->first_deferred_pfn``; absent once all are initialised."""
        self._pieces: list[tuple[int, int, Zone]] = []
        self.keeps_cma = True
        """``deferred_init_memmap_chunk`` asks ``kho_scratch_migratetype`` (7.2 and later)."""
        self.uninitialised: list[tuple[int, int]] = []
        """Pages in use whose struct pages were never set up: all zero, so it seems."""
        self._piece_starts: list[int] = []
        self._cma_ranges: list[tuple[int, int]] = []
        self.cma_areas: list[tuple[int, int]] = []
        """pfn ranges that the contiguous allocator has reserved in early boot."""
        self._zonelists: dict[tuple[int | None, bool], list[Zone]] = {}

    def free_area_init(
        self, node_ranges: Iterable[tuple[int, int, int]], *, deferred: bool = True
    ) -> None:
        """``free_area_init``: the zones of each node, and where deferred initialisation begins.

        ``node_ranges`` are ``(start_pfn, end_pfn, nid)``, ascending, as memblock knows them;
        ``deferred`` is ``CONFIG_DEFERRED_STRUCT_PAGE_INIT``.
        """
        by_node: dict[int, list[tuple[int, int]]] = {}
        for start_pfn, end_pfn, nid in node_ranges:
            by_node.setdefault(nid, []).append((start_pfn, end_pfn))
        shift = self.arch.page_shift
        limits = [(name, end >> shift) for name, end in self.arch.zone_ends_phys]
        limits.append(("Normal", _NO_LIMIT))
        end_of_memory = max((ranges[-1][1] for ranges in by_node.values()), default=0)
        self.pageblocks = Pageblocks(self.arch.pageblock_order, end_of_memory)
        for nid, ranges in sorted(by_node.items()):
            low = 0
            for name, high in limits:
                inside = [
                    (max(start, low), min(end, high))
                    for start, end in ranges
                    if start < high and end > low
                ]
                if inside:
                    start_pfn, end_pfn = inside[0][0], inside[-1][1]
                    max_order = self.arch.max_page_order
                    zone = Zone(nid, name, start_pfn, end_pfn, max_order, self.pageblocks)
                    self.zones.append(zone)
                    self._pieces.extend((start, end, zone) for start, end in inside)
                    last = inside
                low = high
            first = self._defer_init(last) if deferred else None
            if first is not None:
                self.first_deferred_pfn[nid] = first
        self._pieces.sort(key=lambda piece: piece[0])
        self._piece_starts = [piece[0] for piece in self._pieces]

    def _defer_init(self, ranges: list[tuple[int, int]]) -> int | None:
        # defer_init: one section of the node's last zone is initialised early, then up to the
        # next section boundary.
        per_section = self.arch.section_bytes >> self.arch.page_shift
        initialised = 0
        for start_pfn, end_pfn in ranges:
            first = max(start_pfn, start_pfn + per_section - initialised)
            candidate = -(-first // per_section) * per_section
            if candidate < end_pfn:
                return candidate
            initialised += end_pfn - start_pfn
        return None

    def set_cma_ranges(self, ranges: Iterable[tuple[int, int]]) -> None:
        """``kho_scratch_migratetype``: pageblocks that overlap these pfn ranges become CMA.

        For boot, after :meth:`free_area_init` and before any page is free; replaces what an
        earlier call marked.
        """
        for start_pfn, end_pfn in self._cma_ranges:
            self.pageblocks.set(start_pfn, end_pfn, MOVABLE)
        self._cma_ranges = [(start, end) for start, end in ranges if start < end]
        for start_pfn, end_pfn in self._cma_ranges:
            self.pageblocks.set(start_pfn, end_pfn, CMA)

    def zone_of(self, pfn: int) -> Zone | None:
        """The zone that ``pfn`` belongs to, or None where memblock knew no memory."""
        i = bisect_right(self._piece_starts, pfn) - 1
        if i >= 0:
            piece = self._pieces[i]
            if pfn < piece[1]:
                return piece[2]
        return None

    def page_zone(self, pfn: int) -> Zone | None:
        """``page_zone``: the zone that the struct page names; a page of zeros is in the first."""
        if any(start <= pfn < end for start, end in self.uninitialised):
            return self.zones[0]
        return self.zone_of(pfn)

    def pieces_in(self, start_pfn: int, end_pfn: int) -> list[tuple[int, int, Zone]]:
        """``[start_pfn, end_pfn)`` cut at zone borders, without the holes."""
        found: list[tuple[int, int, Zone]] = []
        if start_pfn >= end_pfn:
            return found
        i = bisect_right(self._piece_starts, start_pfn)
        for low, high, zone in islice(self._pieces, i and i - 1, None):
            if low >= end_pfn:
                break
            if high >= end_pfn and low <= start_pfn:  # in the midst of it
                return [(start_pfn, end_pfn, zone)]
            if high > start_pfn:
                found.append((max(low, start_pfn), min(high, end_pfn), zone))
        return found

    def migratetype_of(self, pfn: int) -> int:
        """``get_pageblock_migratetype``."""
        return self.pageblocks.type_of(pfn)

    def is_initialised(self, pfn: int, nid: int) -> bool:
        """``early_page_initialised``: the struct page of ``pfn`` is set up already."""
        return pfn < self.first_deferred_pfn.get(nid, _NO_LIMIT)

    def memblock_free_pages(self, start_pfn: int, end_pfn: int, nid: int) -> None:
        """Free boot memory: at once where struct pages are initialised, later where deferred."""
        first_deferred = self.first_deferred_pfn.get(nid, _NO_LIMIT)
        if end_pfn > first_deferred:
            deferred_start = max(start_pfn, first_deferred)
            self.deferred.append((deferred_start, end_pfn, nid))
            end_pfn = deferred_start
        if start_pfn < end_pfn:
            self._free_unmanaged(start_pfn, end_pfn, to_tail=True)

    def page_alloc_init_late(self) -> None:
        """``page_alloc_init_late``: initialise the deferred struct pages and free them."""
        self.first_deferred_pfn.clear()
        deferred, self.deferred = self.deferred, []
        for start_pfn, end_pfn, _nid in deferred:
            if not self.keeps_cma:
                self.pageblocks.set(start_pfn, end_pfn, MOVABLE)
            self._free_unmanaged(start_pfn, end_pfn, to_tail=True)

    def _free_unmanaged(self, start_pfn: int, end_pfn: int, *, to_tail: bool) -> None:
        # Pages that their zone did not manage so far; none of them is in the page map.
        for low, high, zone in self.pieces_in(start_pfn, end_pfn):
            zone.managed_pages += high - low
            for first, last, migratetype in self.pageblocks.runs(low, high):
                zone.free_range(first, last, migratetype, to_tail=to_tail)

    def zonelist(self, nid: int | None, this_node: bool) -> list[Zone]:
        """``node_zonelist``: where an allocation looks, from ``nid`` (None: node 0) on."""
        found = self._zonelists.get((nid, this_node))
        if found is None:
            wanted = 0 if nid is None else nid
            nodes = sorted({zone.nid for zone in self.zones})
            order = [n for n in nodes if n >= wanted] + [n for n in nodes if n < wanted]
            if this_node:
                order = [wanted]
            found = [zone for n in order for zone in reversed(self.zones) if zone.nid == n]
            self._zonelists[nid, this_node] = found
        return found

    def nr_free_pages(self) -> int:
        """Free pages of all zones."""
        return sum(zone.nr_free_pages() for zone in self.zones)

    def nr_deferred_pages(self) -> int:
        """Free pages whose struct pages are not initialised yet."""
        return sum(end - start for start, end, _nid in self.deferred)
