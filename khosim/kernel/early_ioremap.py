"""Looking at physical memory before the direct map is up.

Models ``mm/early_ioremap.c:early_memremap`` with the fixmaps of ``arch/{x86,arm64}/include/asm/
fixmap.h`` @ 7.3: whole pages are mapped, at most 256 KiB of them (one page more on arm64), and
their number is counted in 32 bits. Left out: running out of slots, memory encryption.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from khosim.errors import KernelPanic

if TYPE_CHECKING:
    from khosim.kernel.kernel import Kernel

__all__ = ("early_fault", "early_memremap")

_MAPPABLE_BYTES = 256 << 10
_PHYS_BITS = 52
_U32 = (1 << 32) - 1
_U64 = (1 << 64) - 1


def early_fault(kernel: Kernel, phys: int, what: str) -> KernelPanic:
    """The end of a kernel that reads ``what`` at ``phys`` outside of what it has mapped."""
    if kernel.arch.name == "x86_64":
        message = f"PANIC: early exception 0x0e: {what} at {phys:#x} is not mapped"
    else:
        message = f"Unable to handle kernel paging request: {what} at {phys:#x} is not mapped"
    return KernelPanic(message, kernel.generation)


def early_memremap(kernel: Kernel, phys: int, size_bytes: int) -> memoryview | None:
    """What the CPU reads from ``phys`` to the end of the last page mapped; None for NULL.

    ``size_bytes`` is a u64. Addresses without RAM read as ones. x86-64 drops address bits beyond
    the page table's 52; arm64 faults on them (:class:`KernelPanic`). The window is empty where the
    count of pages wraps to 0: whoever reads it faults.
    """
    last = (phys + size_bytes - 1) & _U64
    if not size_bytes or last < phys:
        kernel.warn("WARNING: mm/early_ioremap.c:136 at __early_ioremap")
        return None
    page = kernel.arch.page_size
    offset = phys & (page - 1)
    span = (((last + page) & -page) - (phys - offset)) & _U64
    nr_pages = (span >> kernel.arch.page_shift) & _U32
    limit = _MAPPABLE_BYTES >> kernel.arch.page_shift
    if nr_pages > limit + (kernel.arch.name == "arm64"):
        kernel.warn("WARNING: mm/early_ioremap.c:151 at __early_ioremap")
        return None
    if phys >> _PHYS_BITS:
        if kernel.arch.name != "x86_64":
            raise early_fault(kernel, phys, "early mapping")
        phys &= (1 << _PHYS_BITS) - 1
    window_bytes = max(0, (nr_pages << kernel.arch.page_shift) - offset)
    if window_bytes and kernel.hardware.is_ram(phys, window_bytes):
        return kernel.ram.view(phys, window_bytes).data
    window = bytearray(b"\xff" * window_bytes)
    for start, end in kernel.hardware.ram_ranges:
        low, high = max(start, phys), min(end, phys + window_bytes)
        if low < high:
            window[low - phys : high - phys] = kernel.ram.read(low, high - low)
    return memoryview(bytes(window))
