"""Pages in somebody's hands: folios, and ``struct page`` as people and tests see it.

Models ``struct folio`` and ``struct page`` (``include/linux/mm_types.h``) with ``folio_get`` and
``folio_put`` (``include/linux/mm.h``) @ 7.3. The state itself lies in
:mod:`khosim.kernel.page_map`; these are handles and copies. Left out: mapcount, LRU, mappings.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from khosim.errors import RamFault

if TYPE_CHECKING:
    from khosim.kernel.kernel import Kernel

__all__ = ("Folio", "Page")


class Page(NamedTuple):
    """A ``struct page`` at one moment. ``kind`` is free, deferred, reserved, allocated, incoming
    or absent; ``head_pfn`` is where the block begins."""

    pfn: int
    kind: str
    nid: int
    zone: str
    migratetype: int
    refcount: int
    order: int
    compound: bool
    head_pfn: int
    private: int
    owner: str


class Folio:
    """A block of pages in the hands of one owner; valid until its kernel jumps."""

    __slots__ = ("kernel", "order", "pfn")

    def __init__(self, kernel: Kernel, pfn: int, order: int) -> None:
        self.kernel = kernel
        self.pfn = pfn
        self.order = order

    def __repr__(self) -> str:
        return f"Folio(pfn={self.pfn:#x}, order={self.order})"

    @property
    def phys(self) -> int:
        """Physical address of the first byte."""
        return self.pfn << self.kernel.arch.page_shift

    @property
    def nr_pages(self) -> int:
        """Pages in the folio."""
        return 1 << self.order

    @property
    def len_bytes(self) -> int:
        """Bytes in the folio."""
        return self.kernel.arch.page_size << self.order

    def write(self, offset: int, data: bytes, *, by: str = "user") -> None:
        """Store ``data`` at ``offset`` bytes into the folio."""
        kernel = self.kernel
        self._check(kernel, offset, len(data))
        kernel.ram.write((self.pfn << kernel.arch.page_shift) + offset, data, kernel.by(by))

    def read(self, offset: int, len_bytes: int) -> bytes:
        """``len_bytes`` bytes from ``offset``."""
        kernel = self.kernel
        self._check(kernel, offset, len_bytes)
        return kernel.ram.read((self.pfn << kernel.arch.page_shift) + offset, len_bytes)

    def get(self) -> None:
        """``folio_get``."""
        self.kernel.check_alive()
        self.kernel.pages.get_page(self.pfn)

    def put(self) -> None:
        """``folio_put``: drop a reference; the last one frees the folio."""
        self.kernel.check_alive()
        freed = self.kernel.pages.free_pages(self.pfn, self.order)
        if self.kernel.trace is not None:
            self.kernel.emit("folio_put", {"pfn": self.pfn, "order": self.order}, freed)

    def _check(self, kernel: Kernel, offset: int, len_bytes: int) -> None:
        if not kernel.alive:
            kernel.check_alive()
        room = kernel.arch.page_size << self.order
        if offset < 0 or len_bytes < 0 or offset + len_bytes > room:
            raise RamFault(self.phys + offset, len_bytes, f"outside of {self!r}")
