"""The default area of the contiguous memory allocator.

Models ``kernel/dma/contiguous.c:early_cma`` and ``dma_contiguous_reserve`` and
``mm/cma.c:cma_declare_contiguous_nid``, ``cma_alloc_mem`` and ``cma_init_reserved_areas`` @ 7.3.
Left out: areas for single nodes (``cma_pernuma=``, ``numa_cma=``) and for huge pages, allocating
from the area, and that pages which were handed over keep their magic when it becomes free.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from khosim.kernel.memblock import MEMBLOCK_KHO_SCRATCH
from khosim.units import memparse

if TYPE_CHECKING:
    from khosim.kernel.kernel import Kernel

__all__ = ("cma_init_reserved_areas", "dma_contiguous_reserve")

_4_GIB = 1 << 32
_MIB = 1 << 20


def dma_contiguous_reserve(kernel: Kernel, limit: int) -> None:
    """``dma_contiguous_reserve``: the default area, below ``limit`` (bytes) if it is not 0."""
    size = kernel.config.cma_bytes
    if size is None:
        return  # without CONFIG_DMA_CMA nobody reads cma= either
    base, fixed = 0, False
    for name, value in kernel.options.words:
        if name == "cma" and value:
            size, base, own_limit = _early_cma(value)
            fixed = base + size == own_limit
            limit = own_limit or limit
    if not size:
        return
    phys = _declare(kernel, base, size, limit, fixed)
    if phys:
        end = phys + (size + kernel.arch.pageblock_bytes - 1 & -kernel.arch.pageblock_bytes)
        shift = kernel.arch.page_shift
        kernel.pages.cma_areas.append((phys >> shift, end >> shift))
        kernel.printk(f"cma: Reserved {size // _MIB} MiB at 0x{phys:016x}")
    else:
        kernel.printk(f"cma: Failed to reserve {size // _MIB} MiB")


def cma_init_reserved_areas(kernel: Kernel) -> None:
    """``cma_init_reserved_areas``: all of each area is free for movable allocations now."""
    for start_pfn, end_pfn in kernel.pages.cma_areas:
        kernel.pages.init_cma_reserved(start_pfn, end_pfn)


def _early_cma(value: str) -> tuple[int, int, int]:
    # size[@base[-limit]]
    size, at = memparse(value)
    if value[at : at + 1] != "@":
        return size, 0, 0
    base, at = memparse(value, at + 1)
    if value[at : at + 1] != "-":
        return size, base, base + size
    return size, base, memparse(value, at + 1)[0]


def _declare(kernel: Kernel, base: int, size: int, limit: int, fixed: bool) -> int:
    memblock, align = kernel.memblock, kernel.arch.pageblock_bytes
    if fixed and base % align:
        kernel.printk(f"cma: Region at 0x{base:016x} must be aligned to 0x{align:016x} bytes")
        return 0
    base = base + align - 1 & -align
    size = size + align - 1 & -align
    limit &= -align
    end = memblock.memblock_end_of_DRAM()
    if not limit or limit > end:
        limit = end
    if base + size > limit:
        kernel.printk(
            f"cma: Size (0x{size:016x}) of region at 0x{base:016x} exceeds limit (0x{limit:016x})"
        )
        return 0
    if fixed and base:
        # cma_fixed_reserve: not marked as the kernel's own, so that scratch does not count it.
        taken = memblock.memblock_is_region_reserved(base, size)
        if kernel.release.fix_cma_fixed and memblock.kho_scratch_only:
            taken = taken or not _is_scratch(kernel, base, base + size)
        return 0 if taken or memblock.memblock_reserve(base, size) else base
    if not memblock.bottom_up and limit >= _4_GIB + size:
        # From 4 GiB upwards, out of the way of memory for devices.
        memblock.memblock_set_bottom_up(True)
        phys = memblock.memblock_alloc_range_nid(size, align, _4_GIB, limit, -1, True)
        memblock.memblock_set_bottom_up(False)
        if phys:
            return phys
    return memblock.memblock_alloc_range_nid(size, align, base, limit, -1, True)


def _is_scratch(kernel: Kernel, start: int, end: int) -> bool:
    # What is not reserved on a handover boot may still be somebody's, but for scratch.
    memory = kernel.memblock.memory
    inside = 0
    for base, limit, flags in zip(memory.base, memory.end, memory.flags, strict=True):
        if flags & MEMBLOCK_KHO_SCRATCH:
            inside += max(0, min(end, limit) - max(start, base))
    return inside == end - start
