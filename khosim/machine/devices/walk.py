"""Walking page tables of 512 entries that lie in RAM, range by range.

Bits 12 to 51 of an entry are the address; where its rights are and what makes it a leaf is a
:class:`Form`. Runs of leaves of one table are one numpy operation.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from khosim.machine.devices.vtd_tables import ADDR_MASK
from khosim.machine.ram import Ram

__all__ = ("AMD", "VTD", "Extent", "Form", "walk")

_FEW = 16


class Form(NamedTuple):
    """A format of entries: the right to read is bit ``rights``, the one to write the next.

    An entry is there where ``present`` is set (0: where it has a right), and a leaf where the bits
    of ``leaf_mask`` are ``leaf``. ``names_level``: bits 9 to 11 are the level of the table below.
    """

    rights: int
    present: int
    leaf_mask: int
    leaf: int
    names_level: bool


VTD = Form(0, 0, 1 << 7, 1 << 7, False)
AMD = Form(61, 1, 7 << 9, 0, True)


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
    form: Form = VTD,
    rights: int = 3,
) -> tuple[list[Extent], int]:
    """Translate the frames [first, end) up to where a table ends or a leaf has no rights.

    Returns the extents, in order and without gaps, and the first frame without a translation
    (``end`` if all have one, or -1 - frame where a table makes no sense). ``rights`` are what the
    tables cannot add to.
    """
    found: list[Extent] = []
    at = first
    while at < end:
        table, level, allowed = table_phys, levels, rights
        while True:
            if not is_ram(table, 4096):
                return found, -1 - at
            bits = 9 * (level - 1)
            index = at >> bits & 511
            entry = int(ram.words[(table >> 3) + index])
            here = entry >> form.rights & allowed
            if not here or entry & form.present != form.present:
                return found, at
            if level == 1 or (entry & form.leaf_mask == form.leaf and level < 4):
                break
            if form.names_level and entry >> 9 & 7 != level - 1:
                return found, -1 - at
            allowed = here
            table = entry & ADDR_MASK
            level -= 1
        last = min(512, index + (end - 1 >> bits) - (at >> bits) + 1)
        words = ram.words[(table >> 3) + index : (table >> 3) + last]
        at = _leaves(words, at, end, level, allowed, form, found)
    return found, end


def _leaves(
    words: np.ndarray[tuple[int], np.dtype[np.uint64]],
    at: int,
    end: int,
    level: int,
    allowed: int,
    form: Form,
    found: list[Extent],
) -> int:
    """Take the leaves at the head of one table's ``words``; returns the next frame."""
    bits = 9 * (level - 1)
    shift = 12 + bits
    base = at >> bits
    leaf_mask, leaf = (form.leaf_mask, form.leaf) if level > 1 else (0, 0)
    if len(words) <= _FEW:
        for step, entry in enumerate(words.tolist()):
            here = entry >> form.rights & allowed
            if not here or entry & form.present != form.present or entry & leaf_mask != leaf:
                return at
            stop = min(end, base + step + 1 << bits)
            frame = (entry & ADDR_MASK) >> shift << bits
            _add(found, Extent(at, stop, frame - (base + step << bits), here, shift))
            at = stop
        return at
    rights = (words >> np.uint64(form.rights)) & np.uint64(allowed)
    mask = np.uint64(form.present | leaf_mask)
    good = (rights != 0) & ((words & mask) == np.uint64(form.present | leaf))
    count = len(words) if good.all() else int(good.argmin())
    words, rights = words[:count], rights[:count]
    frames = ((words & np.uint64(ADDR_MASK)) >> np.uint64(shift)).astype(np.int64) << bits
    deltas = frames - (np.arange(base, base + count, dtype=np.int64) << bits)
    cut = np.flatnonzero((np.diff(deltas) != 0) | (rights[1:] != rights[:-1])) + 1
    starts = [0, *cut.tolist(), count]
    for one, following in pairwise(starts):
        stop = min(end, base + following << bits)
        _add(found, Extent(at, stop, int(deltas[one]), int(rights[one]), shift))
        at = stop
    return at


def _add(found: list[Extent], extent: Extent) -> None:
    if found:
        before = found[-1]
        if before[1] == extent[0] and before[2:] == extent[2:]:
            found[-1] = Extent(before.first, *extent[1:])
            return
    found.append(extent)
