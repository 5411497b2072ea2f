"""shmem: files that live in memory.

Models ``mm/shmem.c`` @ 7.3: ``struct shmem_inode_info``, ``shmem_get_folio_gfp``,
``shmem_alloc_and_add_folio``, ``shmem_add_to_page_cache``, ``shmem_inode_acct_blocks`` and
``shmem_recalc_inode``, with large folios as ``huge=`` allows them. Calls take page ranges: what the
kernel does folio by folio is done for whole runs where nothing can tell the difference. Contents
are in RAM and nowhere else.

Left out: swap, quotas and size limits, memory policy but for one preferred node, memory cgroups
(their refusals can be injected), userfaultfd.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from khosim.abi.memfd import F_SEAL_SEAL
from khosim.errors import InputError, KernelPanic
from khosim.kernel.folio_range import put_folio_range
from khosim.kernel.memory_failure import keep_poisoned
from khosim.kernel.page_cache import AddressSpace, CacheRun
from khosim.kernel.slab import may_fail

if TYPE_CHECKING:
    from khosim.kernel.kernel import Kernel

__all__ = (
    "HUGE_MODES",
    "MAX_LFS_FILESIZE",
    "SGP_CACHE",
    "SGP_FALLOC",
    "SGP_WRITE",
    "SHMEM_F_MAPPING_FROZEN",
    "ShmemInode",
    "max_pagecache_order",
)

MAX_LFS_FILESIZE = (1 << 63) - 1
SHMEM_F_NORESERVE = 1 << 0
SHMEM_F_MAPPING_FROZEN = 1 << 2
HUGE_MODES = ("never", "always", "within_size", "advise", "deny", "force")

# enum sgp_type
SGP_CACHE = 2
SGP_WRITE = 3
SGP_FALLOC = 4

_MAX_XAS_ORDER = 11  # XA_CHUNK_SHIFT * 2 - 1
_NO_PAGE = 1 << 64


def max_pagecache_order(page_shift: int) -> int:
    """``MAX_PAGECACHE_ORDER``: the largest folio of a file, with transparent huge pages."""
    return min(_MAX_XAS_ORDER, page_shift - 3)


class ShmemInode:
    """An unlinked shmem inode: ``struct inode`` and ``struct shmem_inode_info`` in one.

    ``huge`` is the mount's policy for large folios, one of :data:`HUGE_MODES`; ``nid`` the node to
    allocate from first. ``alloced`` counts pages, ``i_blocks`` units of 512 bytes, ``i_count`` the
    open files.
    """

    __slots__ = (
        "__weakref__",
        "alloced",
        "detached",
        "fallocend",
        "flags",
        "huge",
        "i_blocks",
        "i_count",
        "i_mode",
        "i_nlink",
        "i_size",
        "kernel",
        "mapping",
        "nid",
        "poisoned",
        "seals",
    )

    def __init__(self, kernel: Kernel, *, huge: str = "never", nid: int | None = None) -> None:
        if huge not in HUGE_MODES:
            raise InputError("huge", f"{huge!r} is not one of {', '.join(HUGE_MODES)}")
        self.kernel = kernel
        self.mapping = AddressSpace()
        self.i_size = 0
        self.i_mode = 0o777
        self.i_nlink = 0
        self.i_blocks = 0
        self.i_count = 0
        self.seals = F_SEAL_SEAL
        self.flags = SHMEM_F_NORESERVE
        self.alloced = 0
        self.fallocend = 0
        self.huge = huge
        self.nid = nid
        self.detached: list[CacheRun] = []
        """Pinned folios that were removed from the file: freed when their last pin goes."""
        self.poisoned: set[int] = set()
        """Pages of the file with ``PG_hwpoison``; see :mod:`khosim.kernel.memory_failure`."""

    @property
    def frozen(self) -> bool:
        """Whether the file is being preserved: its size and its holes cannot change then."""
        return bool(self.flags & SHMEM_F_MAPPING_FROZEN)

    def shmem_freeze(self, freeze: bool) -> None:
        """``shmem_freeze``."""
        if freeze:
            self.flags |= SHMEM_F_MAPPING_FROZEN
        else:
            self.flags &= ~SHMEM_F_MAPPING_FROZEN

    # -- accounting -----------------------------------------------------------------------------

    def acct_blocks(self, nr_pages: int) -> int:
        """``shmem_inode_acct_blocks``: 0, or -ENOSPC when that is injected."""
        if may_fail(self.kernel, "shmem_inode_acct_blocks"):
            return -errno.ENOSPC
        self.i_blocks += nr_pages << (self.kernel.arch.page_shift - 9)
        return 0

    def recalc(self, alloced: int) -> None:
        """``shmem_recalc_inode``: ``alloced`` pages are new; pages that are gone are given back."""
        self.alloced += alloced
        freed = self.alloced - self.mapping.nrpages
        if freed > 0:
            self.alloced -= freed
            self.i_blocks -= freed << (self.kernel.arch.page_shift - 9)

    # -- getting folios -------------------------------------------------------------------------

    def get_folios(
        self, first: int, end: int, sgp: int, *, write_end: int = 0, movable: bool = True
    ) -> tuple[int, int]:
        """``shmem_get_folio`` for each page of [first, end) in turn: ``(error, page reached)``.

        Holes get folios. ``SGP_CACHE`` zeroes what is not up to date, ``SGP_FALLOC`` zeroes what
        was there before and not up to date, ``SGP_WRITE`` leaves that to the caller. Stops at the
        first refusal, a negative errno: -EFBIG, -EINVAL behind the end of the file
        (``SGP_CACHE``), -ENOMEM, -ENOSPC; what was added before it stays.
        """
        shift = self.kernel.arch.page_shift
        at = first
        while at < end:
            if at > MAX_LFS_FILESIZE >> shift:
                return -errno.EFBIG, at
            if sgp == SGP_CACHE and at << shift >= self.i_size:
                return -errno.EINVAL, at
            run = self.mapping.find(at)
            if run is not None:
                if not run.uptodate and sgp != SGP_WRITE:
                    self.make_uptodate(at, min(run.end, end))
                at = run.end
                continue
            error, at = self._fill(at, end, sgp, write_end, movable)
            if error:
                return error, at
        return 0, at

    def make_uptodate(self, first: int, end: int) -> None:
        """Zero the folios in [first, end) that are not up to date, and say that they are."""
        kernel = self.kernel
        shift = kernel.arch.page_shift
        by = kernel.by("shmem_get_folio_gfp")
        for run in self.mapping.overlapping(first, end):
            if not run.uptodate:
                low, high = run.clip(first, end)
                kernel.ram.zero(run.pfn_of(low) << shift, (high - low) << shift, by)
        self.mapping.mark(first, end, uptodate=True)

    def _fill(self, at: int, end: int, sgp: int, write_end: int, movable: bool) -> tuple[int, int]:
        # The hole at page ``at``, up to the next folio; one step of it where folios are large.
        following = self.mapping.next_start(at)
        hole_end = _NO_PAGE if following is None else following
        orders = self._allowable_huge_orders(at, write_end)
        if orders:
            got = self._fill_huge(at, min(end, hole_end), hole_end, orders, sgp, movable)
            if got > at:
                return 0, got
            hole_end = at + 1
        return self._add(at, min(end, hole_end) - at, 0, sgp, movable)

    def _allowable_huge_orders(self, index: int, write_end: int) -> int:
        # shmem_allowable_huge_orders of a file that is not mapped: a mask of orders.
        if self.huge in ("never", "advise", "deny"):
            return 0
        page_shift = self.kernel.arch.page_shift
        max_order = max_pagecache_order(page_shift)
        if self.huge == "force":
            return 1 << (page_shift - 3) if page_shift - 3 <= max_order else 0
        orders = (1 << (max_order + 1)) - 2
        if self.huge == "always":
            return orders
        # shmem_get_orders_within_size
        nr_pages = -(-max(write_end, self.i_size) >> page_shift)
        while orders:
            order = orders.bit_length() - 1
            if (index >> order) + 1 << order <= nr_pages:
                return orders
            orders &= ~(1 << order)
        return 0

    def _fill_huge(
        self, at: int, end: int, hole_end: int, orders: int, sgp: int, movable: bool
    ) -> int:
        # The page behind the large folios that were added, or ``at`` when there were none.
        hole_start = self.mapping.prev_end(at)
        largest = orders.bit_length() - 1
        nr_blocks = min(-(-(end - at) >> largest), (hole_end - at) >> largest)
        if self.huge == "within_size" and nr_blocks > 1:
            size = self.i_size >> self.kernel.arch.page_shift
            nr_blocks = max(1, min(nr_blocks, (size - at) >> largest))
        if nr_blocks > 1 and not at & ((1 << largest) - 1):
            reached = self._add(at, nr_blocks, largest, sgp, movable)[1]
            if reached > at:
                return reached
        while orders:
            order = orders.bit_length() - 1
            index = at >> order << order
            orders &= ~(1 << order)
            if index < hole_start or index + (1 << order) > hole_end:
                continue
            runs = self._alloc(order, 1, movable)
            if runs:
                error = self._attach(index, runs[0][0], order, sgp)
                return at if error else index + (1 << order)
        return at

    def _add(self, at: int, nr_folios: int, order: int, sgp: int, movable: bool) -> tuple[int, int]:
        # shmem_alloc_and_add_folio, nr_folios times: (error, page reached).
        end = at + (nr_folios << order)
        if self.kernel.pages.fail is None:
            first, new = at, []
            for pfn, count in self._alloc(order, nr_folios, movable):
                new.append(CacheRun(at, pfn, order, count))
                at += count << order
            self.add_many(first, at, new)
            self.recalc(at - first)
            if sgp == SGP_CACHE:
                self.make_uptodate(first, at)
            return -errno.ENOMEM if at < end else 0, at
        while at < end:
            runs = self._alloc(order, 1, movable)
            if not runs:
                return -errno.ENOMEM, at
            error = self._attach(at, runs[0][0], order, sgp)
            if error:
                return error, at
            at += 1 << order
        return 0, at

    def add_many(self, first: int, end: int, new: list[CacheRun]) -> None:
        """Add folios to a hole [first, end) of the file, all but for ``shmem_recalc_inode``."""
        nr_pages = sum(run.nr_folios << run.order for run in new)
        self.mapping.splice(first, end, new)
        self.i_blocks += nr_pages << (self.kernel.arch.page_shift - 9)
        if self.kernel.trace is not None:
            for run in new:
                self._emit_added(run)

    def _alloc(self, order: int, nr_folios: int, movable: bool) -> list[tuple[int, int]]:
        # shmem_alloc_folio: (first pfn, folios) runs, short without memory.
        pages = self.kernel.pages
        symbol = "shmem_alloc_folio"
        nid = self.nid
        if nr_folios > 1:
            return pages.alloc_pages_bulk(
                order, nr_folios, symbol, movable=movable, compound=order > 0, nid=nid
            )
        pfn = pages.alloc_pages(order, symbol, movable=movable, compound=order > 0, nid=nid)
        return [] if pfn is None else [(pfn, 1)]

    def _attach(self, index: int, pfn: int, order: int, sgp: int) -> int:
        """Put one newly allocated folio into the file; it is freed where the file refuses it."""
        error = self.charge() or self.add_to_page_cache(CacheRun(index, pfn, order, 1))
        if not error:
            error = self.acct_blocks(1 << order)
            if error:
                # Large folios of other files might be split to make room: once more.
                error = self.acct_blocks(1 << order)
            if error:
                self.mapping.take(index, index + (1 << order))
        if error:
            self.kernel.pages.free_pages(pfn, order)
            self.recalc(0)
            return error
        self.recalc(1 << order)
        if sgp == SGP_CACHE:
            self.make_uptodate(index, index + (1 << order))
        return 0

    def charge(self) -> int:
        """``mem_cgroup_charge``: 0, or -ENOMEM when that is injected."""
        return -errno.ENOMEM if may_fail(self.kernel, "mem_cgroup_charge") else 0

    def add_to_page_cache(self, run: CacheRun) -> int:
        """``shmem_add_to_page_cache`` of a charged folio: 0, -EEXIST or -ENOMEM.

        Without the accounting. The kernel dies of folios that are not aligned in the file.
        """
        kernel = self.kernel
        if run.index & ((1 << run.order) - 1):
            raise KernelPanic(
                f"kernel BUG: VM_BUG_ON_FOLIO(index {run.index:#x} of an order {run.order} folio) "
                "in shmem_add_to_page_cache",
                kernel.generation,
            )
        if self.mapping.overlapping(run.index, run.end):
            return -errno.EEXIST
        if may_fail(kernel, "shmem_add_to_page_cache"):
            return -errno.ENOMEM
        if kernel.trace is not None:
            self._emit_added(run)
        self.mapping.insert(run)
        return 0

    def _emit_added(self, run: CacheRun) -> None:
        args = {"index": run.index, "pfn": run.pfn, "order": run.order}
        args["nr_folios"] = run.nr_folios
        self.kernel.emit("shmem_add_to_page_cache", args, 0)

    # -- losing folios --------------------------------------------------------------------------

    def drop(self, runs: list[CacheRun]) -> None:
        """``filemap_remove_folio`` and the last ``folio_put`` of folios taken from the mapping.

        Pinned ones stay in memory until they are unpinned.
        """
        for run in keep_poisoned(self, runs) if self.poisoned else runs:
            if run.pins:
                self.detached.append(run)
            else:
                put_folio_range(self.kernel, run.pfn, run.nr_folios, run.order)
