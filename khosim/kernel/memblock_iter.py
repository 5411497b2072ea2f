"""Walking memblock: free ranges forwards and backwards, and the search for a place to allocate.

Source: ``mm/memblock.c:__next_mem_range``, ``__next_mem_range_rev``, ``should_skip_region``,
``__memblock_find_range_top_down``, ``__memblock_find_range_bottom_up`` @ 7.3.

The walks look at the arrays anew at every step, as the kernel's do, so that a loop body may add or
reserve. The searches jump by bisection to where the kernel's scan would first have a chance; for
sizes and alignments where that could show (size 0, alignments that are no power of two) they scan
as the kernel does. Left out: the walk over the s390 ``physmem`` array.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator

from khosim.kernel.memblock_regions import (
    MAX_NUMNODES,
    MEMBLOCK_DRIVER_MANAGED,
    MEMBLOCK_HOTPLUG,
    MEMBLOCK_KHO_SCRATCH,
    MEMBLOCK_MIRROR,
    MEMBLOCK_NOMAP,
    NUMA_NO_NODE,
    PHYS_ADDR_MAX,
    RegionArray,
    numa_valid_node,
)

__all__ = (
    "find_bottom_up",
    "find_top_down",
    "free_ranges",
    "free_ranges_reverse",
    "memory_ranges",
    "skip_masks",
)

_HIDDEN = MEMBLOCK_NOMAP | MEMBLOCK_DRIVER_MANAGED
_HIDDEN_MOVABLE = _HIDDEN | MEMBLOCK_HOTPLUG
_WANTED = MEMBLOCK_MIRROR | MEMBLOCK_KHO_SCRATCH


def skip_masks(flags: int, movable_node: bool) -> tuple[int, int]:
    """What ``should_skip_region`` makes of ``flags``: ``(forbidden, needed)`` region flags.

    A memory region is skipped if it has a forbidden flag or lacks a needed one.
    """
    return (_HIDDEN_MOVABLE if movable_node else _HIDDEN) & ~flags, flags & _WANTED


def _skips(memory: RegionArray, idx: int, nid: int, forbidden: int, needed: int) -> bool:
    flags = memory.flags[idx]
    return bool(
        flags & forbidden
        or flags & needed != needed
        or (nid != NUMA_NO_NODE and nid != memory.nid[idx])
    )


def memory_ranges(
    memory: RegionArray, nid: int, flags: int, *, movable_node: bool, reverse: bool = False
) -> Iterator[tuple[int, int, int]]:
    """Yield ``(start, end, nid)`` of the memory regions that ``nid`` and ``flags`` admit."""
    wanted = nid if numa_valid_node(nid) else NUMA_NO_NODE
    forbidden, needed = skip_masks(flags, movable_node)
    idx = memory.cnt - 1 if reverse else 0
    step = -1 if reverse else 1
    while 0 <= idx < memory.cnt:
        if not _skips(memory, idx, wanted, forbidden, needed):
            yield memory.base[idx], memory.end[idx], memory.nid[idx]
        idx += step


def free_ranges(
    memory: RegionArray, reserved: RegionArray, nid: int, flags: int, *, movable_node: bool
) -> Iterator[tuple[int, int, int]]:
    """Yield ``(start, end, nid)`` of memory that is not reserved, lowest first.

    Two reserved regions that touch leave an empty range between them, as in the kernel.
    """
    wanted = nid if numa_valid_node(nid) else NUMA_NO_NODE
    forbidden, needed = skip_masks(flags, movable_node)
    idx_a = idx_b = 0
    while idx_a < len(memory.base):
        m_start, m_end = memory.base[idx_a], memory.end[idx_a]
        m_flags, node = memory.flags[idx_a], memory.nid[idx_a]
        if (
            m_flags & forbidden
            or m_flags & needed != needed
            or (wanted != NUMA_NO_NODE and wanted != node)
        ):
            idx_a += 1
            continue
        idx_b = max(idx_b, bisect_right(reserved.base, m_start))
        if idx_b > len(reserved.base):
            return
        r_start = reserved.end[idx_b - 1] if idx_b else 0
        r_end = reserved.base[idx_b] if idx_b < len(reserved.base) else PHYS_ADDR_MAX
        if r_start >= m_end:
            idx_a += 1
            continue
        if m_end <= r_end:
            idx_a += 1
        else:
            idx_b += 1
        yield max(m_start, r_start), min(m_end, r_end), node


def free_ranges_reverse(
    memory: RegionArray, reserved: RegionArray, nid: int, flags: int, *, movable_node: bool
) -> Iterator[tuple[int, int, int]]:
    """Yield ``(start, end, nid)`` of memory that is not reserved, highest first."""
    wanted = nid if numa_valid_node(nid) else NUMA_NO_NODE
    forbidden, needed = skip_masks(flags, movable_node)
    idx_a = memory.cnt - 1
    idx_b = len(reserved.base)
    while idx_a >= 0:
        m_start, m_end = memory.base[idx_a], memory.end[idx_a]
        m_flags, node = memory.flags[idx_a], memory.nid[idx_a]
        if (
            m_flags & forbidden
            or m_flags & needed != needed
            or (wanted != NUMA_NO_NODE and wanted != node)
        ):
            idx_a -= 1
            continue
        idx_b = bisect_left(reserved.end, m_end, 0, idx_b)
        r_start = reserved.end[idx_b - 1] if idx_b else 0
        r_end = reserved.base[idx_b] if idx_b < len(reserved.base) else PHYS_ADDR_MAX
        if r_end <= m_start:
            idx_a -= 1
            continue
        end = m_end
        if r_end < end:
            end = r_end
        if m_start >= r_start:
            idx_a -= 1
            yield m_start, end, node
        else:
            idx_b -= 1
            yield r_start, end, node


def find_top_down(
    memory: RegionArray,
    reserved: RegionArray,
    start: int,
    end: int,
    size: int,
    align: int,
    nid: int,
    flags: int,
    movable_node: bool,
) -> int:
    """Highest free, aligned place for ``size`` bytes in [start, end), or 0."""
    if not size or align & (align - 1):
        return _scan_top_down(memory, reserved, start, end, size, align, nid, flags, movable_node)
    mask = -align
    forbidden = (_HIDDEN_MOVABLE if movable_node else _HIDDEN) & ~flags
    needed = flags & _WANTED
    any_nid = not 0 <= nid < MAX_NUMNODES
    m_base, m_ends, m_flags, m_nid = memory.base, memory.end, memory.flags, memory.nid
    r_base, r_ends = reserved.base, reserved.end
    for idx in range(bisect_left(m_base, end) - 1, -1, -1):
        high = m_ends[idx]
        if high <= start:
            return 0
        region_flags = m_flags[idx]
        if region_flags & forbidden or region_flags & needed != needed:
            continue
        if not any_nid and m_nid[idx] != nid:
            continue
        low = m_base[idx]
        if low < start:
            low = start
        if high > end:
            high = end
        gap = bisect_left(r_ends, high)
        if gap < len(r_base) and r_base[gap] < high:
            high = r_base[gap]
        while gap:
            gap -= 1
            below = r_ends[gap]
            if below <= low:
                break
            if high - below >= size:
                cand = (high - size) & mask
                if cand >= below:
                    return cand
            high = r_base[gap]
        cand = (high - size) & mask
        if cand >= low < high:
            return cand
    return 0


def find_bottom_up(
    memory: RegionArray,
    reserved: RegionArray,
    start: int,
    end: int,
    size: int,
    align: int,
    nid: int,
    flags: int,
    movable_node: bool,
) -> int:
    """Lowest free, aligned place for ``size`` bytes in [start, end), or 0."""
    if not size or not align or align & (align - 1):
        return _scan_bottom_up(memory, reserved, start, end, size, align, nid, flags, movable_node)
    forbidden = (_HIDDEN_MOVABLE if movable_node else _HIDDEN) & ~flags
    needed = flags & _WANTED
    any_nid = not 0 <= nid < MAX_NUMNODES
    m_base, m_ends = memory.base, memory.end
    r_base, r_ends = reserved.base, reserved.end
    mask, slack = -align, align - 1
    for idx in range(bisect_right(m_ends, start), len(m_base)):
        low = m_base[idx]
        if low >= end:
            return 0
        region_flags = memory.flags[idx]
        if region_flags & forbidden or region_flags & needed != needed:
            continue
        if not any_nid and memory.nid[idx] != nid:
            continue
        if low < start:
            low = start
        high = min(m_ends[idx], end)
        gap = bisect_right(r_ends, low)
        while low < high:
            above = r_base[gap] if gap < len(r_base) else PHYS_ADDR_MAX
            cand = (low + slack) & mask
            if cand + size <= above and cand + size <= high:
                return cand
            if above >= high:
                break
            low = r_ends[gap]
            gap += 1
    return 0


def _scan_top_down(
    memory: RegionArray,
    reserved: RegionArray,
    start: int,
    end: int,
    size: int,
    align: int,
    nid: int,
    flags: int,
    movable_node: bool,
) -> int:
    ranges = free_ranges_reverse(memory, reserved, nid, flags, movable_node=movable_node)
    for low, high, _nid in ranges:
        low = min(max(low, start), end)
        high = min(max(high, start), end)
        if high < size:
            continue
        cand = (high - size) & ~((align - 1) & PHYS_ADDR_MAX)
        if cand >= low:
            return cand
    return 0


def _scan_bottom_up(
    memory: RegionArray,
    reserved: RegionArray,
    start: int,
    end: int,
    size: int,
    align: int,
    nid: int,
    flags: int,
    movable_node: bool,
) -> int:
    ranges = free_ranges(memory, reserved, nid, flags, movable_node=movable_node)
    for low, high, _nid in ranges:
        low = min(max(low, start), end)
        high = min(max(high, start), end)
        cand = (((low - 1) | (align - 1) & PHYS_ADDR_MAX) + 1) & PHYS_ADDR_MAX
        if cand < high and high - cand >= size:
            return cand
    return 0
