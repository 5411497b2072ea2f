"""Taking pages away from a shmem file: truncation, holes, and the undoing of a failed fallocate.

Models ``mm/shmem.c:shmem_undo_range``, ``shmem_setattr``, ``shmem_fallocate`` and
``shmem_evict_inode`` with ``mm/truncate.c:truncate_inode_partial_folio`` and the splitting of large
folios in ``mm/huge_memory.c`` @ 7.3. Left out: swap entries, mappings into processes, signals.
"""

from __future__ import annotations

import errno

from khosim.abi.memfd import (
    F_SEAL_FUTURE_WRITE,
    F_SEAL_GROW,
    F_SEAL_SHRINK,
    F_SEAL_WRITE,
)
from khosim.errors import KernelError
from khosim.kernel.page_cache import CacheRun
from khosim.kernel.page_map import ALLOCATED, PageState
from khosim.kernel.shmem import MAX_LFS_FILESIZE, SGP_FALLOC, ShmemInode

__all__ = (
    "FALLOC_FL_KEEP_SIZE",
    "FALLOC_FL_PUNCH_HOLE",
    "shmem_evict_inode",
    "shmem_fallocate",
    "shmem_setattr_size",
    "shmem_truncate_range",
)

FALLOC_FL_KEEP_SIZE = 0x01
FALLOC_FL_PUNCH_HOLE = 0x02
_FOR_EVER = 1 << 64


def shmem_truncate_range(inode: ShmemInode, start: int, end: int | None = None) -> None:
    """``shmem_truncate_range``: no data in bytes [start, end), to the end of all when None.

    Whole folios go, the rest is zeroed; large folios are split where nobody pins them.
    """
    shift = inode.kernel.arch.page_shift
    first = -(-start >> shift)
    last = _FOR_EVER if end is None else end >> shift
    if first < inode.fallocend <= last:
        inode.fallocend = first
    _drop_whole(inode, first, last)
    # The page in which the range begins, and the one in which it ends.
    _truncate_partial(inode, start >> shift, start, end)
    if end is not None and (end - 1) >> shift != start >> shift:
        _truncate_partial(inode, (end - 1) >> shift, start, end)
    _drop_whole(inode, first, last)
    inode.recalc(0)


def _drop_whole(inode: ShmemInode, first: int, last: int) -> None:
    # Folios that lie in [first, last) with all their pages; only the outer ones may not.
    mapping = inode.mapping
    found = mapping.overlapping(first, last)
    if not found:
        return
    low, high = found[0].clip(first, last)[0], found[-1].clip(first, last)[1]
    if low < first:
        low += 1 << found[0].order
    if high > last:
        high -= 1 << found[-1].order
    if low < high:
        inode.drop(mapping.take(low, high))


def _truncate_partial(inode: ShmemInode, index: int, start: int, end: int | None) -> None:
    # shmem_get_partial_folio and truncate_inode_partial_folio
    shift = inode.kernel.arch.page_shift
    mapping = inode.mapping
    run = mapping.find(index)
    if run is None:
        return
    low, high = run.clip(index, index + 1)
    mapping.mark(low, high, dirty=True)
    zero_start = max(start, low << shift)
    zero_end = high << shift if end is None else min(end, high << shift)
    if zero_start >= zero_end:
        return
    if zero_start == low << shift and zero_end == high << shift:
        inode.drop(mapping.take(low, high))
        return
    _zero(inode, run, zero_start, zero_end)
    if not run.order or not _split(inode, low, zero_start >> shift):
        return
    if zero_end < high << shift:
        second = mapping.find(zero_end >> shift)
        if second is not None and second.order:
            low, _ = second.clip(zero_end >> shift, (zero_end >> shift) + 1)
            _split(inode, low, zero_end >> shift)


def _zero(inode: ShmemInode, run: CacheRun, start: int, end: int) -> None:
    kernel = inode.kernel
    shift = kernel.arch.page_shift
    if start < end:
        phys = (run.pfn_of(start >> shift) << shift) + (start & ((1 << shift) - 1))
        kernel.ram.zero(phys, end - start, kernel.by("truncate_inode_partial_folio"))


def _split(inode: ShmemInode, low: int, at: int) -> bool:
    """``folio_split``: the large folio at page ``low`` into halves, and so on towards ``at``.

    Fails while the folio is pinned. Pieces behind the end of the file are dropped, but for the
    first one and what fallocate promised.
    """
    kernel = inode.kernel
    mapping = inode.mapping
    folio = mapping.find(low)
    if folio is None or folio.pins or kernel.pages.pages.page_count(folio.pfn_of(low)) != 1:
        return False
    shift = kernel.arch.page_shift
    end_of_file = max(-(-inode.i_size >> shift), inode.fallocend)
    (run,) = mapping.take(low, low + (1 << folio.order))
    pieces = []
    index, order = run.index, run.order
    while order:
        order -= 1
        half = index + (1 << order)
        if at < half:
            pieces.append((half, order))
        else:
            pieces.append((index, order))
            index = half
    pieces.append((index, 0))
    page_map = kernel.pages.pages
    owner = "shmem_alloc_folio"
    for index, order in sorted(pieces):
        pfn = run.pfn_of(index)
        state = PageState(ALLOCATED, order, order > 0, owner)
        page_map.set(pfn, pfn + (1 << order), state)
        piece = CacheRun(index, pfn, order, 1, dirty=run.dirty, uptodate=run.uptodate)
        if index >= end_of_file and index != run.index:
            inode.drop([piece])
        else:
            mapping.insert(piece)
    inode.recalc(0)
    return True


def shmem_setattr_size(inode: ShmemInode, new_size: int) -> None:
    """``shmem_setattr`` of the size: raises -EPERM for a sealed or frozen file, -EFBIG."""
    symbol = "shmem_setattr"
    old_size = inode.i_size
    if new_size < 0:
        raise KernelError(errno.EINVAL, symbol, f"size {new_size}")
    if new_size > MAX_LFS_FILESIZE:
        raise KernelError(errno.EFBIG, symbol, f"size {new_size}")
    if new_size < old_size and inode.seals & F_SEAL_SHRINK:
        raise KernelError(errno.EPERM, symbol, "F_SEAL_SHRINK")
    if new_size > old_size and inode.seals & F_SEAL_GROW:
        raise KernelError(errno.EPERM, symbol, "F_SEAL_GROW")
    if new_size != old_size:
        if inode.frozen:
            raise KernelError(errno.EPERM, symbol, "the file is being preserved")
        inode.i_size = new_size
    if new_size <= old_size and inode.alloced:
        shmem_truncate_range(inode, new_size)
    if inode.kernel.trace is not None:
        inode.kernel.emit(symbol, {"old_size": old_size, "new_size": new_size}, 0)


def shmem_fallocate(inode: ShmemInode, mode: int, offset: int, len_bytes: int) -> None:
    """``vfs_fallocate`` and ``shmem_fallocate``: fill a range with folios, or make a hole.

    Raises -EINVAL, -EOPNOTSUPP for other modes, -EPERM for a sealed or frozen file, -EFBIG,
    -ENOMEM or -ENOSPC: then the folios that were added are taken back, except those that somebody
    used meanwhile and those that were there before.
    """
    symbol = "shmem_fallocate"
    shift = inode.kernel.arch.page_shift
    if offset < 0 or len_bytes <= 0:
        raise KernelError(errno.EINVAL, symbol, f"[{offset}, +{len_bytes})")
    if mode & ~(FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE) or mode == FALLOC_FL_PUNCH_HOLE:
        raise KernelError(errno.EOPNOTSUPP, symbol, f"mode {mode:#x}")
    if offset + len_bytes > MAX_LFS_FILESIZE:
        raise KernelError(errno.EFBIG, symbol, f"[{offset}, +{len_bytes})")
    if inode.frozen:
        raise KernelError(errno.EPERM, symbol, "the file is being preserved")
    end = offset + len_bytes
    if mode & FALLOC_FL_PUNCH_HOLE:
        if inode.seals & (F_SEAL_WRITE | F_SEAL_FUTURE_WRITE):
            raise KernelError(errno.EPERM, symbol, "F_SEAL_WRITE")
        shmem_truncate_range(inode, offset, end)
        return
    if inode.seals & F_SEAL_GROW and end > inode.i_size:
        raise KernelError(errno.EPERM, symbol, "F_SEAL_GROW")
    first, last = offset >> shift, -(-end >> shift)
    undo_fallocend = inode.fallocend
    inode.fallocend = max(inode.fallocend, last)
    error, reached = inode.get_folios(first, last, SGP_FALLOC, write_end=end)
    inode.mapping.mark(first, reached, dirty=True)
    if error:
        inode.fallocend = undo_fallocend
        for run in inode.mapping.overlapping(first, reached):
            if not run.uptodate:
                inode.drop(inode.mapping.take(max(run.index, first), min(run.end, reached)))
        inode.recalc(0)
    elif not mode & FALLOC_FL_KEEP_SIZE and end > inode.i_size:
        inode.i_size = end
    if inode.kernel.trace is not None:
        args = {"mode": mode, "offset": offset, "len": len_bytes}
        inode.kernel.emit(symbol, args, error)
    if error:
        raise KernelError(-error, symbol, f"at page {reached:#x} of the file")


def shmem_evict_inode(inode: ShmemInode) -> None:
    """``shmem_evict_inode``: the last user is gone, all folios go."""
    inode.i_size = 0
    shmem_truncate_range(inode, 0)
    if inode.i_blocks:
        inode.kernel.printk(f"shmem_evict_inode: i_blocks={inode.i_blocks}")
