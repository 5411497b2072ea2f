"""Low memory that is set aside and zeroed, to see whether the BIOS writes to it.

Models ``arch/x86/kernel/check.c:setup_bios_corruption_check`` @ 7.3 and its options, of a kernel
that checks only when it is told to. Left out: the check itself, once a minute, and that the kernel
walks its ranges while it reserves them.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from khosim.units import memparse

if TYPE_CHECKING:
    from khosim.kernel.kernel import Kernel

__all__ = ("setup_bios_corruption_check",)

_PAGE = 4096
_MAX_SCAN_AREAS = 8
_SIZE = 64 << 10
"""Checked by default, all of which is reserved anyway."""
_U32 = (1 << 32) - 1
_NUMBER = re.compile(r"\+?[0-9]+\n?")


def setup_bios_corruption_check(kernel: Kernel) -> None:
    """``setup_bios_corruption_check``: free memory below the size that was asked for is zeroed.

    It is reserved from then on. What was handed over is not, so far, and is free memory here.
    """
    size = _asked_bytes(kernel)
    memblock = kernel.memblock
    if not size or (kernel.release.fix_corruption_check and memblock.kho_scratch_only):
        return
    by = kernel.by("setup_bios_corruption_check")
    areas = 0
    for start, end, _nid in list(memblock.for_each_free_mem_range()):
        start = min(max(start + _PAGE - 1 & -_PAGE, _PAGE), size)
        end = min(max(end & -_PAGE, _PAGE), size)
        if start >= end:
            continue
        memblock.memblock_reserve(start, end - start)
        if kernel.hardware.is_ram(start, end - start):
            kernel.ram.zero(start, end - start, by)
        areas += 1
        if areas >= _MAX_SCAN_AREAS:
            break
    if areas:
        kernel.printk(f"Scanning {areas} areas for low memory corruption")


def _asked_bytes(kernel: Kernel) -> int:
    is_on, size = False, _SIZE
    for name, value in kernel.options.words:
        if name == "memory_corruption_check" and value and _NUMBER.fullmatch(value):
            is_on = int(value) != 0
        elif name == "memory_corruption_check_size" and value is not None:
            wanted, end = memparse(value)
            size = wanted & _U32 if end == len(value) else size
    return size + _PAGE - 1 & -_PAGE & _U32 if is_on else 0
