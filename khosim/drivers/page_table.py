"""Page tables of an IOMMU domain: pages of the kernel's memory, in VT-d's or AMD's format.

Models the generic page table of ``drivers/iommu/generic_pt`` @ 7.3 as the drivers use it for a
second-stage domain of four levels (``fmt/vtdss.h``, ``fmt/amdv1.h``), and
``drivers/iommu/iommu-pages.c``. Leaves are as large as
addresses allow: 1 GiB, 2 MiB, 4 KiB. Preserving and restoring walk the tree as proposed in "iommu:
Add live update state preservation". Left out: contiguous-page hints, dirty tracking, freeing tables
that became empty by unmapping.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from khosim.abi.amd_iommu import (
    AMD_PTE_PRESENT,
    AMD_PTE_READ,
    AMD_PTE_WRITE,
    amd_pte_next_level,
)
from khosim.abi.vtd import LEVEL_BITS, PTE_LARGE, PTE_READ, PTE_WRITE, address_of
from khosim.errors import KernelError, KernelPanic
from khosim.kernel.page import Folio

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from khosim.kernel.kernel import Kernel

__all__ = ("AMD_FORMAT", "LEVELS", "VTD_FORMAT", "PageTable", "PteFormat")

LEVELS = 4
_ENTRIES = 1 << LEVEL_BITS
_LEAF_BITS = (12, 21, 30)
_OWNER = "iommu_alloc_pages"


class PteFormat(NamedTuple):
    """How entries are written: bits of the rights, and of a leaf above the lowest level.

    ``is_level_named``: an entry that leads to a table names that table's level, and a leaf none.
    """

    read: int
    write: int
    large: int
    is_level_named: bool

    def leaf(self, level: int, *, write: bool) -> int:
        """The bits of a leaf beside its address."""
        return self.read | (self.write if write else 0) | (self.large if level else 0)

    def table(self, level: int) -> int:
        """The bits of an entry that leads to the table of ``level`` (0: that of 4 KiB leaves)."""
        named = amd_pte_next_level(level + 1) if self.is_level_named else 0
        return self.read | self.write | named

    def is_leaf(self, entry: int) -> bool:
        """Whether an entry above the lowest level is one."""
        if self.is_level_named:
            return not entry & amd_pte_next_level(7)
        return bool(entry & self.large)


VTD_FORMAT = PteFormat(PTE_READ, PTE_WRITE, PTE_LARGE, False)
AMD_FORMAT = PteFormat(AMD_PTE_PRESENT | AMD_PTE_READ, AMD_PTE_WRITE, 0, True)


class PageTable:
    """The tree of one domain. ``top_phys`` is its root, ``vasz`` its width in bits of address."""

    __slots__ = ("format", "kernel", "top_phys")

    vasz = 12 + LEVELS * LEVEL_BITS

    def __init__(
        self, kernel: Kernel, top_phys: int = 0, *, format: PteFormat = VTD_FORMAT
    ) -> None:
        self.kernel = kernel
        self.format = format
        self.top_phys = top_phys or self._alloc()

    def _alloc(self) -> int:
        # iommu_alloc_pages_node_sz
        return self.kernel.alloc_folio(0, owner=_OWNER, zero=True).phys

    def _table(self, phys: int) -> NDArray[np.uint64]:
        return np.frombuffer(self.kernel.ram.read(phys, 4096), dtype=np.uint64)

    # -- mapping --------------------------------------------------------------------------------

    def map(self, iova: int, phys: int, len_bytes: int, *, write: bool = True) -> None:
        """``iommu_map``: whole pages; raises -ENOMEM, -EEXIST, -EINVAL, -ERANGE.

        As in the kernel a refusal leaves what was mapped before it: the caller unmaps.
        """
        symbol = "iommu_map"
        if (iova | phys | len_bytes) & 0xFFF or not len_bytes:
            raise KernelError(errno.EINVAL, symbol, f"{iova:#x} to {phys:#x}, {len_bytes:#x}")
        if iova + len_bytes > 1 << self.vasz:
            raise KernelError(errno.ERANGE, symbol, f"beyond {self.vasz} bits")
        at, end = iova, iova + len_bytes
        while at < end:
            level, count = self._largest(at, phys + at - iova, end - at)
            self._write_leaves(at, phys + at - iova, level, count, write)
            at += count << _LEAF_BITS[level]
        if self.kernel.trace is not None:
            args = {"iova": iova, "phys": phys, "len_bytes": len_bytes}
            self.kernel.emit(symbol, args, 0)

    def _largest(self, iova: int, phys: int, len_bytes: int) -> tuple[int, int]:
        # The largest leaf that fits, and how many of them before a larger one does or a table ends.
        level = 2
        while level:
            size = 1 << _LEAF_BITS[level]
            if not (iova | phys) & size - 1 and len_bytes >= size:
                break
            level -= 1
        bits = _LEAF_BITS[level]
        count = min(len_bytes >> bits, _ENTRIES - (iova >> bits) % _ENTRIES)
        if level < 2 and not (iova ^ phys) & (1 << _LEAF_BITS[level + 1]) - 1:
            to_larger = -iova & (1 << _LEAF_BITS[level + 1]) - 1
            count = min(count, to_larger >> bits or count)
        return level, count

    def _write_leaves(self, iova: int, phys: int, level: int, count: int, write: bool) -> None:
        table = self._descend(iova, level)
        index = (iova >> _LEAF_BITS[level]) % _ENTRIES
        if self._table(table)[index : index + count].any():
            raise KernelError(errno.EEXIST, "iommu_map", f"{iova:#x} is mapped")
        leaves = np.arange(count, dtype=np.uint64) << np.uint64(_LEAF_BITS[level])
        leaves += np.uint64(phys | self.format.leaf(level, write=write))
        kernel = self.kernel
        kernel.ram.write(table + 8 * index, leaves.tobytes(), kernel.by("iommu_map"))

    def _descend(self, iova: int, level: int) -> int:
        # The table of that level for an address, made where there is none.
        kernel = self.kernel
        table = self.top_phys
        for above in range(LEVELS - 1, level, -1):
            at = table + 8 * ((iova >> 12 + LEVEL_BITS * above) % _ENTRIES)
            entry = kernel.ram.read_u64(at)
            if not entry:
                entry = self._alloc() | self.format.table(above - 1)
                kernel.ram.write_u64(at, entry, kernel.by("iommu_map"))
            elif self.format.is_leaf(entry):
                raise KernelError(errno.EEXIST, "iommu_map", f"{iova:#x} is mapped")
            table = address_of(entry)
        return table

    def unmap(self, iova: int, len_bytes: int) -> None:
        """``iommu_unmap``: whole leaves inside of the range; the caller flushes the IOTLB."""
        kernel = self.kernel
        by = kernel.by("iommu_unmap")
        for table, level, base in list(self._tables(self.top_phys, LEVELS - 1, 0)):
            step = 12 + LEVEL_BITS * level
            low = max(0, (iova - base + (1 << step) - 1) >> step)
            high = min(_ENTRIES, (iova + len_bytes - base) >> step)
            entries = self._table(table)
            for index in range(low, high):
                if entries[index] and (not level or self.format.is_leaf(int(entries[index]))):
                    kernel.ram.write_u64(table + 8 * index, 0, by)
        if kernel.trace is not None:
            kernel.emit("iommu_unmap", {"iova": iova, "len_bytes": len_bytes}, 0)

    # -- the tree as a whole --------------------------------------------------------------------

    def _tables(self, table: int, level: int, base: int) -> Iterator[tuple[int, int, int]]:
        # (physical address, level, first iova) of a table and of all below it.
        yield table, level, base
        if not level:
            return
        entries = self._table(table)
        for index in np.flatnonzero(entries).tolist():
            entry = int(entries[index])
            if not self.format.is_leaf(entry):
                below = base + (index << 12 + LEVEL_BITS * level)
                yield from self._tables(address_of(entry), level - 1, below)

    def pages(self) -> list[int]:
        """Physical addresses of all tables, the root first."""
        return [table for table, _, _ in self._tables(self.top_phys, LEVELS - 1, 0)]

    def preserve(self) -> None:
        """``pt_iommu`` preserve: every table is preserved, or none; raises the refusal."""
        kernel = self.kernel
        pfns = np.array(self.pages(), dtype=np.int64) >> kernel.arch.page_shift
        kernel.kho_preserve_folios(np.sort(pfns), 0)

    def unpreserve(self) -> None:
        """Undo :meth:`preserve`."""
        kernel = self.kernel
        for phys in self.pages():
            kernel.kho_unpreserve_folio(Folio(kernel, phys >> kernel.arch.page_shift, 0))

    def restore(self) -> None:
        """Take all tables over; dies where one is not there, for a device may be using it."""
        for phys in self.pages():
            if self.kernel.kho_restore_folio(phys) is None:
                raise KernelPanic(
                    f"kernel BUG in iommu_restore_pages: no preserved page at {phys:#x}",
                    self.kernel.generation,
                )

    def free(self) -> None:
        """``iommu_put_pages_list``: give all tables back."""
        kernel = self.kernel
        for phys in self.pages():
            Folio(kernel, phys >> kernel.arch.page_shift, 0).put()
