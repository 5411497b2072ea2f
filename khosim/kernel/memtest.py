"""Tests of RAM at boot, which overwrite what nobody has reserved yet.

Models ``mm/memtest.c:parse_memtest`` and ``early_memtest`` @ 7.3. The RAM of the simulator is never
bad, so that of all passes the last one is left to be seen: a pattern of zeros. Left out: the log's
line for each pass and range.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from khosim.kernel.memblock import MEMBLOCK_KHO_SCRATCH, MEMBLOCK_NONE

if TYPE_CHECKING:
    from khosim.kernel.kernel import Kernel

__all__ = ("early_memtest",)

_NR_PATTERNS = 17
_U32 = (1 << 32) - 1
_NUMBER = re.compile(r"\+?(0[xX][0-9a-fA-F]+|[0-9]+)\n?")


def _nr_passes(kernel: Kernel) -> int:
    found = 0
    for name, value in kernel.options.words:
        if name == "memtest":
            found = _NR_PATTERNS if value is None else _kstrtouint(value, found)
    return found


def _kstrtouint(text: str, otherwise: int) -> int:
    # Base 0; what is no number leaves the variable as it was.
    match = _NUMBER.fullmatch(text)
    if match is None:
        return otherwise
    digits = match[1]
    base = 16 if digits[:2].lower() == "0x" else 8 if digits.startswith("0") else 10
    try:
        number = int(digits, base)
    except ValueError:
        return otherwise
    return number if number <= _U32 else otherwise


def early_memtest(kernel: Kernel, start: int, end: int) -> None:
    """``early_memtest``: with ``memtest=`` all free memory in ``[start, end)`` is zero afterwards.

    Asks memblock for memory that is free, not whether early boot may allocate it: on a handover
    boot nothing that was preserved is reserved by then.
    """
    nr_passes = _nr_passes(kernel)
    if not nr_passes:
        return
    kernel.printk(f"early_memtest: # of tests: {nr_passes}")
    memblock = kernel.memblock
    is_safe = kernel.release.fix_memtest and memblock.kho_scratch_only
    flags = MEMBLOCK_KHO_SCRATCH if is_safe else MEMBLOCK_NONE
    by = kernel.by("memtest")
    for low, high, _nid in list(memblock.for_each_free_mem_range(-1, flags)):
        # Whole words of 8 bytes.
        low, high = max(low, start) + 7 & -8, min(high, end) & -8
        if low < high and kernel.hardware.is_ram(low, high - low):
            kernel.ram.zero(low, high - low, by)
