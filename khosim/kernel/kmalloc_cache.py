"""Small objects whose place in memory matters: the caches behind kzalloc.

Models ``mm/slub.c:kmem_cache_alloc``, ``calculate_order`` and ``set_freepointer`` @ 7.3 for objects
that a handover points at. A cache takes blocks from the buddy allocator and deals them out from the
lowest address up; a block without objects goes back. A free object holds the (virtual) address of
the next one in its middle, and else what was there before: a kernel that reads a bitmap too far
reads that, so it has to be there.

Simplified: objects of other users share the blocks of a real kernel, with their own pointers, but
not these; what lies behind a block is what the buddy allocator has there. Left out: freelist
randomisation and hardening (a tiny kernel has neither, those of distributions have both), per-cpu
and per-node lists, empty blocks that are kept, addresses of a kernel with KASLR.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from khosim.kernel.kernel import Kernel

__all__ = ("KmallocCache",)

_MAX_ORDER = 3  # slub_max_order: PAGE_ALLOC_COSTLY_ORDER
_PAGE_OFFSET = {"x86_64": 0xFFFF888000000000, "arm64": 0xFFFF000000000000}
_ARM64_MEMSTART_ALIGN = 1 << 30


class KmallocCache:
    """The cache ``kmalloc-<size_bytes>``; addresses are physical."""

    __slots__ = ("_free", "_kernel", "_order", "_slabs", "size_bytes")

    def __init__(self, kernel: Kernel, size_bytes: int) -> None:
        self._kernel = kernel
        self.size_bytes = size_bytes
        self._order = self._calculate_order()
        self._slabs: dict[int, int] = {}
        """First address of each block -> objects in use."""
        self._free: list[int] = []
        """Addresses of free objects, the next one last."""

    def _calculate_order(self) -> int:
        # calculate_order: enough objects for all CPUs, but no more than order 3.
        nr_cpus = self._kernel.config.nr_cpus
        min_objects = 4 * (nr_cpus.bit_length() + 1)
        pages = -(-min_objects * self.size_bytes >> self._kernel.arch.page_shift)
        order = min((pages - 1).bit_length(), _MAX_ORDER)
        needed = (self.size_bytes - 1) >> self._kernel.arch.page_shift
        return max(order, needed.bit_length())

    @property
    def slab_bytes(self) -> int:
        """Bytes of one block."""
        return self._kernel.arch.page_size << self._order

    def kzalloc(self, symbol: str) -> int:
        """``kzalloc``: the address of a zeroed object for ``symbol``, 0 where there is no memory.

        ``kernel.pages.fail`` is asked for each object as for a page.
        """
        kernel = self._kernel
        fail = kernel.pages.fail
        if fail is not None and fail(0, symbol):
            return 0
        kfence = kernel.kfence
        if kfence is not None:
            phys = kfence.alloc(self.size_bytes)
            if phys:
                kernel.ram.zero(phys, self.size_bytes, kernel.by(symbol))
                return phys
        if not self._free:
            owner = f"kmalloc-{self.size_bytes}"
            pfn = kernel.pages.alloc_pages(self._order, owner, compound=self._order > 0)
            if pfn is None:
                return 0
            slab = pfn << kernel.arch.page_shift
            self._slabs[slab] = 0
            end = slab + self.slab_bytes - self.size_bytes
            self._free = list(range(end, slab - 1, -self.size_bytes))
            for at, following in pairwise((0, *self._free)):
                self._set_freepointer(following, at)
        phys = self._free.pop()
        self._slabs[self._slab_of(phys)] += 1
        kernel.ram.zero(phys, self.size_bytes, kernel.by(symbol))
        return phys

    def kfree(self, phys: int) -> None:
        """``kfree``; a block without objects goes back to the buddy allocator."""
        kfence = self._kernel.kfence
        if kfence is not None and kfence.holds(phys):
            kfence.free(phys)
            return
        slab = self._slab_of(phys)
        self._slabs[slab] -= 1
        if self._slabs[slab]:
            self._set_freepointer(phys, self._free[-1] if self._free else 0)
            self._free.append(phys)
            return
        del self._slabs[slab]
        end = slab + self.slab_bytes
        self._free = [other for other in self._free if not slab <= other < end]
        self._kernel.pages.free_pages(slab >> self._kernel.arch.page_shift, self._order)

    def _set_freepointer(self, phys: int, following: int) -> None:
        # set_freepointer: s->offset is in the middle, out of reach of small overflows.
        kernel = self._kernel
        virt = self._virt(following) if following else 0
        at = phys + (self.size_bytes // 2 & -8)
        kernel.ram.write_u64(at, virt, kernel.by("set_freepointer"))

    def _virt(self, phys: int) -> int:
        arch = self._kernel.arch.name
        if arch == "arm64":
            phys -= self._kernel.memblock.memblock_start_of_DRAM() & -_ARM64_MEMSTART_ALIGN
        return _PAGE_OFFSET[arch] + phys

    def holds(self, phys: int) -> bool:
        """Whether ``phys`` is in one of the cache's blocks."""
        return self._slab_of(phys) in self._slabs

    def _slab_of(self, phys: int) -> int:
        return phys & -self.slab_bytes
