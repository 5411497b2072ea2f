"""Pages whose memory is broken, and that nobody may read any more.

Models ``mm/memory-failure.c:memory_failure`` @ 7.3 for a page of a shmem file: the page stays in
the file (``shmem_error_remove_folio``) with ``PG_hwpoison``, which reading, writing and faults ask
for. It never goes back to the allocator. Left out: pages of anybody else, large folios (which the
kernel splits first), processes that are killed, soft offlining.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from khosim.errors import KernelError
from khosim.kernel.page_map import ALLOCATED, PageState

if TYPE_CHECKING:
    from khosim.kernel.page_cache import CacheRun
    from khosim.kernel.shmem import ShmemInode
    from khosim.kernel.shmem_file import ShmemFile

__all__ = ("check_poison", "keep_poisoned", "memory_failure")

_OWNER = "PG_hwpoison"


def memory_failure(file: ShmemFile, offset: int) -> None:
    """The memory of the page at ``offset`` bytes of ``file`` is broken (``MADV_HWPOISON``).

    Raises -ENXIO where the file has no page, -EBUSY for a large folio. A page that is pinned is
    poisoned as well; the kernel calls that a failure.
    """
    file.check_open()
    symbol = "memory_failure"
    inode = file.inode
    index = offset >> inode.kernel.arch.page_shift
    run = inode.mapping.find(index)
    if run is None:
        raise KernelError(errno.ENXIO, symbol, f"no page at {offset}")
    if run.order:
        raise KernelError(errno.EBUSY, symbol, "a large folio")
    inode.poisoned.add(index)
    if inode.kernel.trace is not None:
        inode.kernel.emit(symbol, {"pfn": run.pfn_of(index)}, 0)


def check_poison(inode: ShmemInode, start: int, end: int, error: int, symbol: str) -> None:
    """Raise -``error`` where a page of bytes [start, end) is poisoned."""
    shift = inode.kernel.arch.page_shift
    if any(start >> shift <= index <= (end - 1) >> shift for index in inode.poisoned):
        raise KernelError(error, symbol, f"{inode.kernel!r}: a poisoned page")


def keep_poisoned(inode: ShmemInode, runs: list[CacheRun]) -> list[CacheRun]:
    """Of folios that are to be freed, those that can be used again; the others are nobody's."""
    page_map = inode.kernel.pages.pages
    left = []
    for run in runs:
        at = run.index
        for index in sorted(i for i in inode.poisoned if run.index <= i < run.end):
            if run.pins:
                break
            pfn = run.pfn_of(index)
            page_map.set(pfn, pfn + 1, PageState(ALLOCATED, 0, False, _OWNER))
            inode.poisoned.discard(index)
            if at < index:
                left.append(run.part(at, index))
            at = index + 1
        if at < run.end:
            left.append(run.part(at, run.end))
    return left
