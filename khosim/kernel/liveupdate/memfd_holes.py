"""Giving back what preserving a memfd put into its holes: what 7.3 does not do.

No kernel has this yet (``fix_memfd_holes``). ``memfd_pin_folios`` @ 7.3 fills every hole, and what
it filled stays in the file when preserving it fails or is called off.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from khosim.kernel.page_cache import CacheRun
    from khosim.kernel.shmem import ShmemInode

__all__ = ("Hole", "empty_holes", "holes_of")

Hole = tuple[int, int]
"""Pages of a file, [first, end)."""
_FOR_EVER = 1 << 64


def holes_of(inode: ShmemInode) -> list[Hole]:
    """The holes of a file up to its end; the last one goes on to the next folio behind it."""
    mapping = inode.mapping
    last = -(-inode.i_size >> inode.kernel.arch.page_shift)
    found = []
    for first, end in mapping.holes(0, last):
        following = mapping.next_start(end)
        at_end = _FOR_EVER if following is None else following
        found.append((first, at_end if end == last else end))
    return found


def empty_holes(inode: ShmemInode, holes: list[Hole]) -> None:
    """Free the folios that were holes and that nobody has written anything but zeros to."""
    for first, end in holes:
        for run in inode.mapping.overlapping(first, end):
            filled = run.part(max(run.index, first), min(run.end, end))
            for low, high in _zero_folios(inode, filled):
                inode.drop(inode.mapping.take(low, high))
    inode.recalc(0)


def _zero_folios(inode: ShmemInode, run: CacheRun) -> list[Hole]:
    # Neighbours together. Of memory that was never touched nothing is read.
    kernel = inode.kernel
    shift = kernel.arch.page_shift
    phys, size = run.pfn << shift, run.nr_pages << shift
    if not any(True for _ in kernel.ram.touched_ranges(phys, phys + size)):
        return [(run.index, run.end)]
    folios = kernel.ram.view(phys, size).reshape(run.nr_folios, -1)
    edges = np.flatnonzero(np.diff(np.concatenate(([True], folios.any(axis=1), [True]))))
    pairs = edges.reshape(-1, 2).tolist()
    return [(run.index + (a << run.order), run.index + (b << run.order)) for a, b in pairs]
