"""What differs between the two architectures that can hand over: x86-64 and arm64.

Constants from ``arch/{x86,arm64}/include/asm`` and ``include/linux/mmzone.h`` @ 7.3, for kernels
with SPARSEMEM_VMEMMAP, NUMA, huge pages and deferred struct-page initialisation. Neither has
ZONE_DMA, and arm64 has no ZONE_DMA32 either: all of its memory counts as low unless
:meth:`Arch.with_zone_dma` says otherwise.
"""

from __future__ import annotations

import dataclasses
from functools import lru_cache

from khosim.errors import InputError

__all__ = ("Arch", "find_arch")

_GIB = 1 << 30


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Arch:
    """One architecture with one page size. Orders are log2 of pages, sizes are bytes."""

    name: str
    page_size: int
    page_shift: int
    max_page_order: int
    """``MAX_PAGE_ORDER``: the largest block of the buddy allocator."""
    pageblock_order: int
    section_bytes: int
    """Memory one sparsemem section covers (``1 << SECTION_SIZE_BITS``)."""
    zone_ends_phys: tuple[tuple[str, int], ...]
    """Zones below the last one, as (name, end): lowest first."""
    dma_address: int
    """``__pa(MAX_DMA_ADDRESS)``: memmap and per-cpu areas are wanted above it."""
    low_address_limit: int
    """``ARCH_LOW_ADDRESS_LIMIT``: the last address of low memory, where DMA always reaches."""
    tree_depth: int
    """``KHO_TREE_MAX_DEPTH`` @ 7.3: levels of the preserved-memory tree, leaf included."""

    @property
    def scratch_align_bytes(self) -> int:
        """``SCRATCH_ALIGNMENT_BYTES`` since 7.2: ``PAGE_SIZE * MAX_ORDER_NR_PAGES``."""
        return self.page_size << self.max_page_order

    @property
    def pageblock_bytes(self) -> int:
        """``CMA_MIN_ALIGNMENT_BYTES``: the bytes of a pageblock; scratch's alignment up to 7.1."""
        return self.page_size << self.pageblock_order

    def with_zone_dma(self, start_phys: int, end_phys: int) -> Arch:
        """``dma_limits_init``: arm64 with ZONE_DMA, on a machine whose RAM spans that range."""
        if self.name != "arm64":
            return self
        limit = min(end_phys, 1 << 32) if start_phys < (1 << 32) - 1 else end_phys
        return dataclasses.replace(
            self, zone_ends_phys=(("DMA", limit),), low_address_limit=limit - 1
        )


def _tree_depth(page_shift: int) -> int:
    table_log2 = page_shift - 3
    leaf_log2 = page_shift + 3
    key_width = 64 - page_shift + 1
    return -(-(key_width - leaf_log2) // table_log2) + 1


# page size -> (MAX_PAGE_ORDER, pageblock order, section size)
_ARM64_PAGES = {
    4096: (10, 9, 128 << 20),
    16384: (11, 11, 128 << 20),
    65536: (13, 13, 512 << 20),
}


@lru_cache(maxsize=8)
def find_arch(name: str, page_size: int) -> Arch:
    """The architecture ``name`` with pages of ``page_size`` bytes.

    Raises :class:`InputError` for a combination that Linux does not have.
    """
    page_shift = page_size.bit_length() - 1
    if name == "x86_64" and page_size == 4096:
        return Arch(
            name=name,
            page_size=page_size,
            page_shift=page_shift,
            max_page_order=10,
            pageblock_order=9,
            section_bytes=128 << 20,
            zone_ends_phys=(("DMA32", 4 * _GIB),),
            dma_address=16 << 20,
            low_address_limit=0xFFFFFFFF,
            tree_depth=_tree_depth(page_shift),
        )
    if name == "arm64" and page_size in _ARM64_PAGES:
        max_order, pageblock_order, section_bytes = _ARM64_PAGES[page_size]
        return Arch(
            name=name,
            page_size=page_size,
            page_shift=page_shift,
            max_page_order=max_order,
            pageblock_order=pageblock_order,
            section_bytes=section_bytes,
            zone_ends_phys=(),
            dma_address=0x40000000,
            low_address_limit=(1 << 52) - 1,  # PHYS_MASK, for want of a DMA zone
            tree_depth=_tree_depth(page_shift),
        )
    raise InputError("page_size", f"{name} has no pages of {page_size} bytes")
