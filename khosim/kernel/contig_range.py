"""Taking a range of pages that somebody chose: alloc_contig_range.

Models ``mm/page_alloc.c:alloc_contig_range_noprof`` @ 7.3 for a range that is free: the blocks it
lies in are taken out and split. Left out: migrating what is in the way, isolation, compound ranges.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from khosim.errors import KernelError
from khosim.kernel.pageblock import MOVABLE, UNMOVABLE

if TYPE_CHECKING:
    from khosim.kernel.kernel import Kernel

__all__ = ("alloc_contig_range", "free_contig_range")


def alloc_contig_range(
    kernel: Kernel, start_pfn: int, nr_pages: int, *, owner: str = "user"
) -> int:
    """``alloc_contig_range``: pages ``[start_pfn, start_pfn + nr_pages)`` of order 0; the first.

    Raises -EINVAL where they are not all in one zone, -EBUSY where one of them is taken or is
    scratch, -ENOMEM where that is injected.
    """
    kernel.check_alive()
    pages, symbol = kernel.pages, "alloc_contig_range"
    end_pfn = start_pfn + nr_pages
    if pages.fail is not None and pages.fail(0, owner):
        raise KernelError(errno.ENOMEM, symbol, f"{nr_pages} pages from pfn {start_pfn:#x}")
    pieces = pages.pieces_in(start_pfn, end_pfn)
    if nr_pages < 1 or len(pieces) != 1 or pieces[0][:2] != (start_pfn, end_pfn):
        raise KernelError(errno.EINVAL, symbol, f"{nr_pages} pages from pfn {start_pfn:#x}")
    zone = pieces[0][2]
    top = kernel.arch.max_page_order
    taken: list[tuple[int, int]] = []
    at = start_pfn
    while at < end_pfn:
        trailing = (at & -at).bit_length() - 1 if at else top
        order = min(trailing, (end_pfn - at).bit_length() - 1, top)
        found = zone.block_at(at, order, (UNMOVABLE, MOVABLE))
        while found is None and order:
            order -= 1
            found = zone.block_at(at, order, (UNMOVABLE, MOVABLE))
        if found is None:
            for low, high in taken:
                pages.free_range(low, high)
            raise KernelError(errno.EBUSY, symbol, f"pfn {at:#x} is taken")
        migratetype, in_order, block = found
        size = 1 << order
        if in_order == top == order:
            start, nr_blocks = zone.max_run_at(migratetype, at)
            nr_blocks = min((end_pfn - at) >> top, ((start - at) >> top) + nr_blocks)
            zone.take_max(migratetype, at, nr_blocks)
            size = nr_blocks << top
        else:
            zone.take(migratetype, in_order, block)
            zone.expand(migratetype, block, in_order, order, at)
        pages.split_range(at, at + size, owner)
        taken.append((at, at + size))
        at += size
    if kernel.trace is not None:
        args = {"pfn": start_pfn, "nr_pages": nr_pages, "owner": owner}
        kernel.emit(symbol, args, start_pfn)
    return start_pfn


def free_contig_range(kernel: Kernel, start_pfn: int, nr_pages: int) -> None:
    """``free_contig_range``: one reference less for each of the pages."""
    kernel.check_alive()
    kernel.pages.free_range(start_pfn, start_pfn + nr_pages)
