"""Pinning a memfd's folios for long, out of the way of movable memory.

Models ``mm/gup.c:memfd_pin_folios``, ``unpin_folios``, ``check_and_migrate_movable_folios`` and
what ``mm/migrate.c:migrate_pages`` does for them @ 7.3. Folios in CMA pageblocks, which is where
scratch lies, are moved away first. Pins are counted in the page cache's runs.

Left out: hugetlb files, ZONE_MOVABLE, device memory, folios that cannot be moved for a while.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable
from itertools import groupby
from typing import TYPE_CHECKING

from khosim.errors import KernelError
from khosim.kernel.folio_range import put_folio_range
from khosim.kernel.page_cache import CacheRun
from khosim.kernel.page_map import ALLOCATED, PageState
from khosim.kernel.pageblock import CMA
from khosim.kernel.shmem import SGP_CACHE, ShmemInode

if TYPE_CHECKING:
    from khosim.kernel.kernel import Kernel
    from khosim.kernel.shmem_file import ShmemFile

__all__ = ("memfd_pin_folios", "unpin_folios")


def memfd_pin_folios(memfd: ShmemFile, start: int, end: int, max_folios: int) -> list[CacheRun]:
    """``memfd_pin_folios``: pin what covers bytes [start, ``end``], the last one included.

    Holes are filled with zeroed folios, and folios in CMA are moved out of it; both stays so after
    a refusal. Raises -EINVAL for a range that is not in the file, -ENOMEM, -ENOSPC. Returns copies
    of the runs, at most ``max_folios`` folios.
    """
    symbol = "memfd_pin_folios"
    inode = memfd.inode
    if start < 0 or start > end or not max_folios or end >= inode.i_size:
        raise KernelError(errno.EINVAL, symbol, f"[{start}, {end}] of {memfd!r}")
    shift = inode.kernel.arch.page_shift
    first, last = start >> shift, (end >> shift) + 1
    while True:
        error = _fill_holes(inode, first, last, max_folios)
        if error:
            raise KernelError(-error, symbol, "memfd_alloc_folio")
        found, reached = _folios_of(inode, first, last, max_folios)
        stuck = _in_cma(inode.kernel, found)
        if not stuck:
            break
        if not _migrate(inode, stuck):
            raise KernelError(errno.ENOMEM, symbol, "migrate_longterm_unpinnable_folios")
    inode.mapping.mark(first, reached, pins=1)
    if inode.kernel.trace is not None:
        args = {"start": start, "end": end}
        inode.kernel.emit(symbol, args, sum(run.nr_folios for run in found))
    return found


def _fill_holes(inode: ShmemInode, first: int, last: int, max_folios: int) -> int:
    # memfd_alloc_folio for each hole, as far as the folios are wanted; with PF_MEMALLOC_PIN nothing
    # comes out of CMA.
    mapping = inode.mapping
    at = first
    while at < last and max_folios > 0:
        run = mapping.find(at)
        if run is not None:
            low, at = run.clip(at, last)
            max_folios -= (at - low) >> run.order
            continue
        hole_end = mapping.next_start(at)
        end = last if hole_end is None else min(hole_end, last)
        error, _ = inode.get_folios(
            at, min(end, at + max_folios), SGP_CACHE, write_end=inode.i_size, movable=False
        )
        if error:
            return error
    return 0


def _folios_of(
    inode: ShmemInode, first: int, last: int, max_folios: int
) -> tuple[list[CacheRun], int]:
    # Copies of the whole folios that cover the range, and the page behind them.
    found = []
    reached = first
    for run in inode.mapping.overlapping(first, last):
        low, high = run.clip(first, last)
        high = min(high, low + (max_folios << run.order))
        found.append(run.part(low, high))
        max_folios -= found[-1].nr_folios
        reached = high
        if not max_folios:
            break
    return found, reached


def _in_cma(kernel: Kernel, runs: Iterable[CacheRun]) -> list[tuple[int, CacheRun]]:
    # folio_is_longterm_pinnable: the folios that begin in a CMA pageblock, with their node.
    stuck = []
    for run in runs:
        shift = run.index - run.pfn
        for low, high, zone in kernel.pages.pieces_in(run.pfn, run.pfn_of(run.end)):
            for start, stop, migratetype in kernel.pages.pageblocks.runs(low, high):
                if migratetype == CMA:
                    stuck.append((zone.nid, run.part(start + shift, stop + shift)))
    return stuck


def _migrate(inode: ShmemInode, stuck: list[tuple[int, CacheRun]]) -> bool:
    """Move folios to pages of the same node outside of CMA; False when memory ran out.

    What was moved by then stays moved. A large folio without a block to go to is split.
    """
    for (nid, order), group in groupby(stuck, key=lambda item: (item[0], item[1].order)):
        runs = [run for _, run in group]
        while runs:
            runs = _migrate_some(inode, runs, nid)
            if not runs:
                break
            folio = runs[0].part(runs[0].index, runs[0].index + (1 << order))
            if not order or not _migrate_split(inode, folio, nid):
                return False
            if folio.end < runs[0].end:
                runs[0] = runs[0].part(folio.end, runs[0].end)
            else:
                del runs[0]
    return True


def _migrate_some(inode: ShmemInode, runs: list[CacheRun], nid: int) -> list[CacheRun]:
    """Allocate, copy, free, for as many folios as there is memory for; returns the others.

    ``runs`` are ascending and of one order (alloc_migration_target, folio_copy).
    """
    kernel = inode.kernel
    shift = kernel.arch.page_shift
    by = kernel.by("migrate_folio")
    order = runs[0].order
    wanted = sum(run.nr_folios for run in runs)
    moved: list[CacheRun] = []
    left = iter(runs)
    old = next(left)
    at = old.index
    for pfn, count in kernel.pages.alloc_pages_bulk(
        order, wanted, "alloc_migration_target", compound=order > 0, nid=nid
    ):
        while count:
            if at == old.end:
                old = next(left)
                at = old.index
            some = min(count, (old.end - at) >> order)
            size = some << order
            kernel.ram.copy(old.pfn_of(at) << shift, pfn << shift, size << shift, by)
            new = old.part(at, at + size)
            new.pfn = pfn
            moved.append(new)
            put_folio_range(kernel, old.pfn_of(at), some, order)
            if kernel.trace is not None:
                args = {"from": old.pfn_of(at), "to": pfn, "order": order, "nr_folios": some}
                kernel.emit("migrate_folio", args, 0)
            pfn += size
            count -= some
            at += size
    inode.mapping.replace(moved)
    return [old.part(at, old.end), *left] if at < old.end else list(left)


def _migrate_split(inode: ShmemInode, folio: CacheRun, nid: int) -> bool:
    # try_split_folio, then each page on its own.
    state = PageState(ALLOCATED, 0, False, "shmem_alloc_folio")
    inode.kernel.pages.pages.set(folio.pfn, folio.pfn + folio.nr_pages, state)
    single = folio.part(folio.index, folio.end)
    single.order, single.nr_folios = 0, folio.nr_pages
    inode.mapping.splice(folio.index, folio.end, [single])
    return not _migrate_some(inode, [single.part(folio.index, folio.end)], nid)


def unpin_folios(inode: ShmemInode, runs: Iterable[CacheRun]) -> None:
    """``unpin_folios``: drop one pin of each folio; the last one frees what left the file."""
    mapping = inode.mapping
    first = end = 0  # pages of the file whose folios lose a pin
    for run in runs:
        at = run.index
        for now in mapping.overlapping(run.index, run.end):
            low, high = max(now.index, run.index), min(now.end, run.end)
            if not now.pins or now.pfn_of(low) != run.pfn_of(low):
                continue
            _unpin_detached(inode, run, at, low)
            at = high
            if low != end:
                mapping.mark(first, end, pins=-1)
                first = low
            end = high
        _unpin_detached(inode, run, at, run.end)
    mapping.mark(first, end, pins=-1)


def _unpin_detached(inode: ShmemInode, run: CacheRun, first: int, end: int) -> None:
    # Folios that were removed from the file while they were pinned.
    if first >= end:
        return
    low_pfn, high_pfn = run.pfn_of(first), run.pfn_of(end)
    kept: list[CacheRun] = []
    for old in inode.detached:
        low = max(old.index, old.index + low_pfn - old.pfn)
        high = min(old.end, old.index + high_pfn - old.pfn)
        if low >= high:
            kept.append(old)
            continue
        kept.extend(
            old.part(start, stop)
            for start, stop in ((old.index, low), (high, old.end))
            if start < stop
        )
        gone = old.part(low, high)
        gone.pins -= 1
        if gone.pins:
            kept.append(gone)
        else:
            put_folio_range(inode.kernel, gone.pfn, gone.nr_folios, gone.order)
    inode.detached = kept
