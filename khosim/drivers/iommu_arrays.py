"""Arrays of equal records in a chain of preserved pages, as the IOMMU core keeps them.

Models the object arrays of ``drivers/iommu/liveupdate.c`` as proposed in "iommu: Add live update
state preservation" v2 to v5 (no release has them): a page holds a header and records; a full one
names the next. Records that were given back are used again.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import TYPE_CHECKING

from khosim.abi.iommu import IOMMU_ARRAY_HDR_BYTES, IOMMU_SER_FLAG_DELETED
from khosim.errors import KernelPanic
from khosim.kernel.page import Folio

if TYPE_CHECKING:
    from khosim.kernel.kernel import Kernel

__all__ = ("ObjectArray",)

_NEXT, _COUNT = 0, 8
_HDR = struct.Struct("<II")
_BY = "iommu_liveupdate"


class ObjectArray:
    """A chain of pages of records of ``entry_bytes``; ``pages`` are their physical addresses."""

    __slots__ = ("_per_page", "entry_bytes", "kernel", "pages")

    def __init__(self, kernel: Kernel, entry_bytes: int, pages: list[int]) -> None:
        self.kernel = kernel
        self.entry_bytes = entry_bytes
        self.pages = pages
        self._per_page = (kernel.arch.page_size - IOMMU_ARRAY_HDR_BYTES) // entry_bytes

    @classmethod
    def make(cls, kernel: Kernel, entry_bytes: int) -> ObjectArray:
        """An empty one; raises -ENOMEM."""
        return cls(kernel, entry_bytes, [kernel.kho_alloc_preserve(kernel.arch.page_size).phys])

    @classmethod
    def restore(cls, kernel: Kernel, entry_bytes: int, phys: int) -> ObjectArray:
        """The predecessor's, whose pages are ours now; dies where one is not there."""
        pages = []
        while phys:
            if phys in pages or kernel.kho_restore_folio(phys) is None:
                raise KernelPanic(
                    f"kernel BUG in iommu_flb_retrieve: no preserved page at {phys:#x}",
                    kernel.generation,
                )
            pages.append(phys)
            phys = kernel.ram.read_u64(phys + _NEXT)
        return cls(kernel, entry_bytes, pages)

    def entries(self) -> Iterator[int]:
        """Physical addresses of the records in use."""
        for entry in self._all():
            if not self._flags(entry) & IOMMU_SER_FLAG_DELETED:
                yield entry

    def _all(self) -> Iterator[int]:
        for page in self.pages:
            count = min(self.kernel.ram.read_u64(page + _COUNT), self._per_page)
            first = page + IOMMU_ARRAY_HDR_BYTES
            yield from range(first, first + count * self.entry_bytes, self.entry_bytes)

    def _flags(self, entry: int) -> int:
        return int(_HDR.unpack(self.kernel.ram.read(entry, _HDR.size))[1])

    def add(self, record: bytes) -> int:
        """Write one more record; returns where. Raises -ENOMEM."""
        kernel = self.kernel
        by = kernel.by(_BY)
        entry = next((at for at in self._all() if self._flags(at) & IOMMU_SER_FLAG_DELETED), 0)
        if not entry:
            last = self.pages[-1]
            count = kernel.ram.read_u64(last + _COUNT)
            if count == self._per_page:
                new = kernel.kho_alloc_preserve(kernel.arch.page_size).phys
                kernel.ram.write_u64(last + _NEXT, new, by)
                self.pages.append(new)
                last, count = new, 0
            entry = last + IOMMU_ARRAY_HDR_BYTES + count * self.entry_bytes
            kernel.ram.write_u64(last + _COUNT, count + 1, by)
        kernel.ram.write(entry, record, by)
        return entry

    def write(self, entry: int, record: bytes) -> None:
        """Write a record anew."""
        self.kernel.ram.write(entry, record, self.kernel.by(_BY))

    def read(self, entry: int) -> bytes:
        """The bytes of a record."""
        return self.kernel.ram.read(entry, self.entry_bytes)

    def delete(self, entry: int) -> None:
        """Give a record back."""
        gone = _HDR.pack(0, IOMMU_SER_FLAG_DELETED)
        self.kernel.ram.write(entry, gone.ljust(self.entry_bytes, b"\0"), self.kernel.by(_BY))

    def free_outgoing(self) -> None:
        """The update is called off: all pages are freed."""
        kernel = self.kernel
        for phys in self.pages:
            kernel.kho_unpreserve_free(Folio(kernel, phys >> kernel.arch.page_shift, 0))

    def free_incoming(self) -> None:
        """The update is over: all pages are freed."""
        kernel = self.kernel
        for phys in self.pages:
            Folio(kernel, phys >> kernel.arch.page_shift, 0).put()
