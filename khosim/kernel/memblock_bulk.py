"""Reserving thousands of blocks at once, exactly as one by one.

Models the loop of ``kernel/liveupdate/kexec_handover.c:kho_preserved_memory_reserve`` @ 7.3 over
``memblock_reserve`` and ``memblock_reserved_mark_noinit``.

As long as no array is doubled, what the loop leaves behind depends on the set of blocks alone: each
byte is reserved, and neighbours of equal attributes are one region. So blocks that meet nothing
reserved are merged in with numpy. How many regions there would be after each block, and hence at
which block the kernel would double the array, is computed beforehand; that block, and any that
overlaps something, takes the slow way. Of what the slow way emits only the warnings about
overlapping reservations can come from here.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt

from khosim.kernel.memblock_regions import (
    MEMBLOCK_NONE,
    MEMBLOCK_RSRV_NOINIT,
    NUMA_NO_NODE,
    PHYS_ADDR_MAX,
    RegionArray,
)

if TYPE_CHECKING:
    from khosim.kernel.memblock import Memblock

__all__ = ("Addresses", "reserve_many")

U64Array: TypeAlias = npt.NDArray[np.uint64]
BoolArray: TypeAlias = npt.NDArray[np.bool_]
Addresses: TypeAlias = Sequence[int] | npt.NDArray[np.uint64] | npt.NDArray[np.int64]
"""Physical addresses: a list of ints or a numpy array."""

_FEW = 24  # blocks up to which numpy does not pay
_SLOW_STEPS = 96  # blocks off the fast way after which the rest goes one by one


def reserve_many(memblock: Memblock, starts: Addresses, ends: Addresses, noinit: bool) -> None:
    """What :meth:`khosim.kernel.memblock.Memblock.memblock_reserve_many` promises."""
    if len(starts) != len(ends):
        raise ValueError(f"{len(starts)} starts but {len(ends)} ends")
    if len(starts) <= _FEW:
        for start, end in zip(starts, ends, strict=True):
            if end < start:
                raise ValueError(f"block [{int(start):#x}, {int(end):#x}) ends before it starts")
        _one_by_one(memblock, starts, ends, noinit)
        return
    first, last = np.asarray(starts, np.uint64), np.asarray(ends, np.uint64)
    if (last < first).any():
        bad = int(np.argmax(last < first))
        raise ValueError(f"block [{int(first[bad]):#x}, {int(last[bad]):#x}) ends before it starts")
    filled = last > first
    if not filled.all():
        if memblock.trace is not None:  # empty blocks do nothing, but are heard
            _one_by_one(memblock, first.tolist(), last.tolist(), noinit)
            return
        first, last = first[filled], last[filled]
    conflict = _overlapping(first, last)
    pos = 0
    slow_steps = 0
    while pos < len(first):
        if slow_steps > _SLOW_STEPS or not memblock.reserved.base:
            stop = len(first) if slow_steps > _SLOW_STEPS else pos + 1
            _one_by_one(memblock, first[pos:stop].tolist(), last[pos:stop].tolist(), noinit)
            pos = stop
            continue
        stop = min(len(first), pos + 2 * memblock.reserved.max + 4096)
        nr_fast = _merge_in(
            memblock.reserved, first[pos:stop], last[pos:stop], conflict[pos:stop], noinit
        )
        if memblock.trace is not None:
            _trace(memblock, first[pos : pos + nr_fast], last[pos : pos + nr_fast], noinit)
        pos += nr_fast
        if pos < stop:
            _one_by_one(
                memblock, first[pos : pos + 1].tolist(), last[pos : pos + 1].tolist(), noinit
            )
            pos += 1
            slow_steps += 1


def _one_by_one(memblock: Memblock, starts: Addresses, ends: Addresses, noinit: bool) -> None:
    # A block that meets nothing reserved, with room for it, ends as if it had come marked.
    # Where the array cannot grow, each block that needs a region of its own fails, and the kernel
    # searches all of memory again each time.
    array = memblock.reserved
    flags = MEMBLOCK_RSRV_NOINIT if noinit else MEMBLOCK_NONE
    for start, end in zip(map(int, starts), map(int, ends), strict=True):
        phys, size = start, end - start
        cnt = len(array.base)
        if cnt <= array.max - 3 and phys < end <= PHYS_ADDR_MAX:
            idx = bisect_right(array.end, phys)
            if idx == cnt or array.base[idx] >= end:
                array.insert_merged(idx, phys, end, NUMA_NO_NODE, flags)
                if memblock.trace is not None:
                    memblock.trace("memblock_reserve", (phys, size), 0)
                    if noinit:
                        memblock.trace("memblock_reserved_mark_noinit", (phys, size), 0)
                continue
        error = memblock.memblock_reserve(phys, size)
        if noinit:
            error |= memblock.memblock_reserved_mark_noinit(phys, size)
        if error and not memblock.no_room_to_grow:
            memblock.no_room_to_grow = not memblock.has_room_to_grow(memblock.reserved)
    memblock.no_room_to_grow = False


def _trace(memblock: Memblock, first: U64Array, last: U64Array, noinit: bool) -> None:
    assert memblock.trace is not None
    for phys, size in zip(first.tolist(), (last - first).tolist(), strict=True):
        memblock.trace("memblock_reserve", (phys, size), 0)
        if noinit:
            memblock.trace("memblock_reserved_mark_noinit", (phys, size), 0)


def _overlapping(first: U64Array, last: U64Array) -> BoolArray:
    # Which blocks overlap one that starts lower. Each of them ends a stretch of fast merging, after
    # which the lower one, if it is yet to come, meets something reserved.
    conflict = np.zeros(len(first), np.bool_)
    order = np.argsort(first, kind="stable")
    low, high = first[order], last[order]
    reached = np.maximum.accumulate(high)
    conflict[order[1:]] = low[1:] < reached[:-1]
    return conflict


def _merge_in(
    array: RegionArray, first: U64Array, last: U64Array, conflict: BoolArray, noinit: bool
) -> int:
    # Merge blocks in up to the first that overlaps something or makes the kernel grow the array;
    # return how many.
    base, end = np.array(array.base, np.uint64), np.array(array.end, np.uint64)
    flags, nid = np.array(array.flags, np.int64), np.array(array.nid, np.int64)
    cnt = len(base)
    above = np.searchsorted(end, first, "right")
    conflict = conflict | ((above < cnt) & (base[np.minimum(above, cnt - 1)] < last))
    count = int(np.argmax(conflict)) if conflict.any() else len(first)
    first, last, above = first[:count], last[:count], above[:count]
    if not count:
        return 0
    block_flags = MEMBLOCK_RSRV_NOINIT if noinit else MEMBLOCK_NONE
    below_idx, above_idx = np.maximum(above - 1, 0), np.minimum(above, cnt - 1)
    touches_below = (above > 0) & (end[below_idx] == first)
    touches_above = (above < cnt) & (base[above_idx] == last)

    def merges(with_flags: int) -> npt.NDArray[np.int64]:
        alike = (flags == with_flags) & (nid == NUMA_NO_NODE)
        seams = np.zeros(count, np.int64)
        seams += touches_below & alike[below_idx]
        seams += touches_above & alike[above_idx]
        return seams

    # Each block adds one region less one for every seam it closes; a seam between two of the
    # blocks closes with the later one.
    order = np.argsort(first, kind="stable")
    seam = last[order[:-1]] == first[order[1:]]
    closes = np.maximum(order[:-1], order[1:])[seam]
    growth = 1 - merges(block_flags) - np.bincount(closes, minlength=count)
    before = cnt + np.cumsum(growth) - growth
    # Reserving wants room for one more. Marking wants room for two more on top of that, once the
    # new region has merged with unmarked neighbours.
    grows = before + 1 > array.max
    if noinit:
        grows |= before + 3 - merges(MEMBLOCK_NONE) > array.max
    if grows.any():
        count = int(np.argmax(grows))
        first, last = first[:count], last[:count]
    if not count:
        return 0
    new_flags = np.concatenate((flags, np.full(count, block_flags, np.int64)))
    new_nid = np.concatenate((nid, np.full(count, NUMA_NO_NODE, np.int64)))
    _rebuild(array, np.concatenate((base, first)), np.concatenate((end, last)), new_flags, new_nid)
    array.total_size += int((last - first).sum())
    return count


def _rebuild(
    array: RegionArray,
    base: U64Array,
    end: U64Array,
    flags: npt.NDArray[np.int64],
    nid: npt.NDArray[np.int64],
) -> None:
    # Sort the regions, merge what touches and is alike, and write the columns back.
    order = np.argsort(base, kind="stable")
    base, end, flags, nid = base[order], end[order], flags[order], nid[order]
    opens = np.ones(len(base), np.bool_)
    opens[1:] = (end[:-1] != base[1:]) | (flags[:-1] != flags[1:]) | (nid[:-1] != nid[1:])
    closes = np.append(opens[1:], True)
    array.base[:] = base[opens].tolist()
    array.end[:] = end[closes].tolist()
    array.flags[:] = flags[opens].tolist()
    array.nid[:] = nid[opens].tolist()
