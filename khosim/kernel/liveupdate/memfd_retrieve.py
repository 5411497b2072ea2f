"""Putting handed-over folios into a new memfd.

Models ``mm/memfd_luo.c:memfd_luo_retrieve_folios`` @ 7.3, by whole runs where all is as it should
be and folio by folio elsewhere. Left out: locks, the LRU.
"""

from __future__ import annotations

import errno
from itertools import chain, islice
from typing import TYPE_CHECKING

from khosim.abi.memfd import MEMFD_LUO_FOLIO_DIRTY, MEMFD_LUO_FOLIO_UPTODATE
from khosim.errors import KernelError
from khosim.kernel.folio_range import FolioRun, is_plain_incoming, restore_folio_range
from khosim.kernel.liveupdate.memfd_records import (
    RecordRun,
    discard_folios,
    folio_runs,
    record_number,
)
from khosim.kernel.page_cache import CacheRun

if TYPE_CHECKING:
    from collections.abc import Iterable

    from khosim.kernel.kernel import Kernel
    from khosim.kernel.memfd import Memfd
    from khosim.kernel.shmem import ShmemInode
    from khosim.kernel.vmalloc import VmStruct

__all__ = ("retrieve_folios",)

_BATCH = 4096


def retrieve_folios(file: Memfd, records: VmStruct, nr_folios: int) -> None:
    """``memfd_luo_retrieve_folios``: restore every folio and add it to the file.

    Raises -EIO where a folio cannot be restored, -EEXIST for two at one place, -ENOMEM, -ENOSPC.
    Folios that are in the file by then stay there; all others are restored and freed.
    """
    inode = file.inode
    kernel = file.kernel
    release = kernel.release
    runs = folio_runs(kernel, records, nr_folios)
    added = 0
    while batch := list(islice(runs, _BATCH)):
        nr_pages = _add_batch(inode, batch)
        added += nr_pages
        for number, run in enumerate(() if nr_pages else batch):
            nr_pages, done, error = _add_batch(inode, [run]), run.nr_folios, 0
            symptom = ""
            if not nr_pages:
                done, error, symptom = _add_run(inode, run)
            added += done << run.order if release.memfd_accounts_pages else done
            if error:
                lost = run.tail(done)
                if symptom:
                    at = record_number(kernel, records, nr_folios, lost.pfn, lost.pgoff)
                    kernel.printk(f"memfd_luo: shmem: failed to {symptom.format(at)}: {error}")
                # The refused folio is gone already; put_folios: the ones behind it.
                rest = [run.tail(done + 1)] if done + 1 < run.nr_folios else []
                behind = chain(rest, batch[number + 1 :], runs)
                if release.memfd_puts_by_address:
                    discard_folios(kernel, behind, warn=False)
                else:
                    _put_by_pfn(kernel, behind)
                inode.recalc(added)
                # Until 0fb1daf0b78d in 7.1 err was that of the folio before: 0, but for the first.
                if error == -errno.EIO and added and not release.memfd_tells_midloop:
                    return
                raise KernelError(-error, "memfd_luo_retrieve_folios", f"{run}")
    inode.recalc(added)


def _put_by_pfn(kernel: Kernel, runs: Iterable[RecordRun]) -> None:
    # Until 7.1: kho_restore_folio(pfn), which frees other folios or none.
    for pfn, _, _, order, nr_folios in runs:
        for head in range(pfn, pfn + (nr_folios << order), 1 << order):
            restored = kernel.kho_in.restore_folio(head)
            if restored is not None:
                kernel.pages.free_pages(*restored)


def _add_batch(inode: ShmemInode, batch: list[RecordRun]) -> int:
    """All runs at once, if none of them can be refused: pages added, 0 if that is not sure.

    Every page is waiting to be restored, none is named twice, and the file has room for all.
    """
    kernel = inode.kernel
    if kernel.pages.fail is not None:
        return 0
    if not kernel.release.memfd_accounts_pages and any(run.order for run in batch):
        return 0  # what is accounted is then not what is added
    at = batch[0].pgoff
    for run in batch:
        if run.pgoff < at or run.pgoff & ((1 << run.order) - 1):
            return 0
        at = run.pgoff + (run.nr_folios << run.order)
    if inode.mapping.overlapping(batch[0].pgoff, at):
        return 0
    blocks: list[FolioRun] = []
    for pfn, _, _, order, nr_folios in sorted(batch):
        if blocks:
            before = blocks[-1]
            end_pfn = before.pfn + (before.nr_folios << before.order)
            if pfn < end_pfn:
                return 0
            if pfn == end_pfn and order == before.order:
                blocks[-1] = before._replace(nr_folios=before.nr_folios + nr_folios)
                continue
        blocks.append(FolioRun(pfn, order, nr_folios))
    if not all(is_plain_incoming(kernel, pfn, count, order) for pfn, order, count in blocks):
        return 0
    for pfn, order, count in blocks:
        restore_folio_range(kernel, pfn, count, order)
    inode.add_many(batch[0].pgoff, at, [_cache_run(run, run.pfn, run.order) for run in batch])
    return sum(run.nr_folios << run.order for run in batch)


def _cache_run(run: RecordRun, pfn: int, order: int) -> CacheRun:
    return CacheRun(
        run.pgoff,
        pfn,
        order,
        run.nr_folios,
        dirty=bool(run.flags & MEMFD_LUO_FOLIO_DIRTY),
        uptodate=bool(run.flags & MEMFD_LUO_FOLIO_UPTODATE),
    )


def _add_run(inode: ShmemInode, run: RecordRun) -> tuple[int, int, str]:
    # Folio by folio: (folios added, error of the next one, what the log says of it).
    kernel = inode.kernel
    for done in range(run.nr_folios):
        one = run.tail(done)._replace(nr_folios=1)
        phys = one.pfn << kernel.arch.page_shift
        restored = kernel.kho_in.restore_folio(phys)
        if restored is None:
            kernel.printk(f"memfd_luo: Unable to restore folio at physical address: {phys:x}")
            return done, -errno.EIO, ""
        error, symptom = _add_folio(inode, _cache_run(one, *restored))
        if error:
            return done, error, symptom
    return run.nr_folios, 0, ""


def _add_folio(inode: ShmemInode, folio: CacheRun) -> tuple[int, str]:
    # The error, and what failed, with a place for the record's number.
    symptom = "charge folio index {}"
    error = inode.charge()
    if not error:
        symptom = "add to page cache folio index {}"
        error = inode.add_to_page_cache(folio)
    if not error:
        nr_pages = 1 << folio.order if inode.kernel.release.memfd_accounts_pages else 1
        symptom = f"account folio index {{}}({nr_pages} pages)"
        if not inode.kernel.release.memfd_accounts_pages:
            symptom = "account folio index {}"
        error = inode.acct_blocks(nr_pages)
        if error:
            inode.mapping.take(folio.index, folio.end)
    if error:
        inode.kernel.pages.free_pages(folio.pfn, folio.order)
    return error, symptom
