"""Walking page tables of 512 entries that lie in RAM, range by range.

The form is that of VT-d's second stage: bit 0 reads, bit 1 writes, bit 7 a leaf above the lowest
level, bits 12 to 51 the address. Runs of leaves of one table are one numpy operation.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from khosim.machine.devices.vtd_tables import ADDR_MASK, PAGE_SIZE_BIT
from khosim.machine.ram import Ram

__all__ = ("Extent", "walk")

_FEW = 16


class Extent(NamedTuple):
    """I/O frames [first, end), in units of 4 KiB, that lie at frame ``first + delta``.

    ``rights`` is the sum of READ (1) and WRITE (2); ``shift`` the log2 of the leaves' bytes.
    """

    first: int
    end: int
    delta: int
    rights: int
    shift: int


def walk(
    ram: Ram,
    is_ram: Callable[[int, int], bool],
    table_phys: int,
    levels: int,
    first: int,
    end: int,
) -> tuple[list[Extent], int]:
    """Translate the frames [first, end) up to where a table ends or a leaf has no rights.

    Returns the extents, in order and without gaps, and the first frame without a translation
    (``end`` if all have one, or -1 - frame where the table itself is not in RAM).
    """
    found: list[Extent] = []
    at = first
    while at < end:
        table, level, rights = table_phys, levels, 3
        while True:
            if not is_ram(table, 4096):
                return found, -1 - at
            bits = 9 * (level - 1)
            index = at >> bits & 511
            entry = int(ram.words[(table >> 3) + index])
            rights_here = rights & entry
            if not rights_here & 3:
                return found, at
            if level == 1 or (entry & PAGE_SIZE_BIT and level < 4):
                break
            rights = rights_here & 3
            table = entry & ADDR_MASK
            level -= 1
        last = min(512, index + (end - 1 >> bits) - (at >> bits) + 1)
        at = _leaves(
            ram.words[(table >> 3) + index : (table >> 3) + last], at, end, level, rights, found
        )
    return found, end


def _leaves(
    words: np.ndarray[tuple[int], np.dtype[np.uint64]],
    at: int,
    end: int,
    level: int,
    rights: int,
    found: list[Extent],
) -> int:
    """Take the leaves at the head of one table's ``words``; returns the next frame."""
    bits = 9 * (level - 1)
    shift = 12 + bits
    base = at >> bits
    if len(words) <= _FEW:
        for step, entry in enumerate(words.tolist()):
            if not entry & rights or (level > 1 and not entry & PAGE_SIZE_BIT):
                return at
            stop = min(end, base + step + 1 << bits)
            frame = (entry & ADDR_MASK) >> shift << bits
            _add(found, Extent(at, stop, frame - (base + step << bits), entry & rights, shift))
            at = stop
        return at
    good = (words & np.uint64(rights)) != 0
    if level > 1:
        good &= (words & np.uint64(PAGE_SIZE_BIT)) != 0
    count = len(words) if good.all() else int(good.argmin())
    words = words[:count]
    frames = ((words & np.uint64(ADDR_MASK)) >> np.uint64(shift)).astype(np.int64) << bits
    deltas = frames - (np.arange(base, base + count, dtype=np.int64) << bits)
    allowed = (words & np.uint64(rights)).astype(np.int64)
    cut = np.flatnonzero((np.diff(deltas) != 0) | (np.diff(allowed) != 0)) + 1
    starts = [0, *cut.tolist(), count]
    for one, following in pairwise(starts):
        stop = min(end, base + following << bits)
        _add(found, Extent(at, stop, int(deltas[one]), int(allowed[one]), shift))
        at = stop
    return at


def _add(found: list[Extent], extent: Extent) -> None:
    if found:
        before = found[-1]
        if before[1] == extent[0] and before[2:] == extent[2:]:
            found[-1] = Extent(before.first, *extent[1:])
            return
    found.append(extent)
