"""Memory that a real kernel leaves alone, so that a simulated one can use it.

The first kernel in the guest is told to keep away from a window in each node
(``memmap=SIZE$START``, ``arch/x86/kernel/e820.c:parse_memmap_one`` @ 7.3). Its successor gets the
firmware's map again, in which the windows are memory like any other: what kexec passes on is the
map as it was before such options.
"""

from __future__ import annotations

from collections.abc import Sequence

from khosim.errors import InputError
from khosim.kernel.buddy import Zone
from khosim.kernel.page_policy import Choice
from khosim.kernel.pageblock import MOVABLE, UNMOVABLE
from khosim.lab.guest_ram import layout
from khosim.machine.memory_map import RAM, RESERVED, MemoryMap, Region

__all__ = ("WindowPolicy", "carve", "memmap_options", "windows_of")

_PAGE_SHIFT = 12
_ALIGN = 4 << 20
_MIN_BYTES = 32 << 20
_MAX_BYTES = 256 << 20

Range = tuple[int, int]


def windows_of(node_bytes: Sequence[int]) -> list[Range]:
    """A quarter of each node, up to 256 MiB, from its middle on, as (start, end).

    Nodes too small for it have none; :class:`InputError` where all are.
    """
    found = []
    for segments in layout(node_bytes):
        start, end, _ = max(segments, key=lambda segment: segment.end - segment.start)
        size = min((end - start) // 4, _MAX_BYTES) & -_ALIGN
        low = (start + (end - start) // 2 + _ALIGN - 1) & -_ALIGN
        if size >= _MIN_BYTES:
            found.append((low, low + size))
    if not found:
        raise InputError("--memory", "no node of 128M or more, so no room for khosim's kernel")
    return found


def memmap_options(windows: Sequence[Range]) -> str:
    """The words of a command line that keep a kernel away from ``windows``."""
    return " ".join(f"memmap={(end - start) >> 20}M${start:#x}" for start, end in windows)


def carve(memory_map: MemoryMap, keep: Sequence[Range]) -> MemoryMap:
    """The map with all RAM outside of ``keep`` reserved; entries that adjoin stay apart."""
    entries: list[Region] = []
    for start, end, kind in memory_map.entries:
        if kind != RAM:
            entries.append(Region(start, end, kind))
            continue
        at = start
        for low, high in sorted(keep):
            low, high = max(low, at), min(high, end)
            if low >= high:
                continue
            if at < low:
                entries.append(Region(at, low, RESERVED))
            entries.append(Region(low, high, RAM))
            at = high
        if at < end:
            entries.append(Region(at, end, RESERVED))
    return MemoryMap(
        tuple(entries), memory_map.node_ranges, memory_map.arch, memory_map.online_nodes
    )


class WindowPolicy:
    """Hands out free blocks inside of ``windows`` only, the nodes of the request first.

    Everything but scratch, the smallest block that fits: a page allocator whose other memory is in
    somebody else's hands. ``next_pfn`` is the page that the next allocation of one page gets.
    """

    def __init__(self, windows: Sequence[Range]) -> None:
        self._windows = [(start >> _PAGE_SHIFT, end >> _PAGE_SHIFT) for start, end in windows]
        self.next_pfn: int | None = None

    def choose(self, zones: list[Zone], order: int, movable: bool) -> Choice | None:
        """See :class:`khosim.kernel.page_policy.Policy`."""
        wanted, self.next_pfn = self.next_pfn, None
        if wanted is not None:
            return self._exactly(zones, wanted)
        for zone in zones:
            for found in range(order, zone.max_order + 1):
                for migratetype in (MOVABLE, UNMOVABLE) if movable else (UNMOVABLE, MOVABLE):
                    for pfn, _ in zone.blocks(migratetype, found):
                        if self._inside(pfn, 1 << found):
                            return zone, migratetype, found, pfn, pfn
        return None

    def _inside(self, pfn: int, nr_pages: int) -> bool:
        return any(start <= pfn and pfn + nr_pages <= end for start, end in self._windows)

    @staticmethod
    def _exactly(zones: list[Zone], pfn: int) -> Choice | None:
        for zone in zones:
            block = zone.block_at(pfn, 0, (MOVABLE, UNMOVABLE))
            if block is not None:
                return (zone, *block, pfn)
        return None
