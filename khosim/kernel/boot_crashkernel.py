"""Memory set aside for a crash kernel.

Models ``kernel/crash_reserve.c:parse_crashkernel`` and ``reserve_crashkernel_generic`` @ 7.3 with
the limits of ``arch/{x86,arm64}/include/asm/crash_reserve.h``. Left out: ``,cma`` and the second
region that x86-64 adds in low memory for a crash kernel above 4 GiB.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from khosim.units import memparse

if TYPE_CHECKING:
    from khosim.kernel.kernel import Kernel

__all__ = ("reserve_crashkernel",)

_MIB = 1 << 20
_4_GIB = 1 << 32
_ALIGN = {"x86_64": 16 * _MIB, "arm64": 2 * _MIB}
_HIGH_MAX = {"x86_64": 64 << 40, "arm64": 1 << 52}
_WORD = re.compile(r"crashkernel=([^ ]*)")
_SUFFIX = re.compile(r",(high|low|cma)$")


def reserve_crashkernel(kernel: Kernel) -> None:
    """``arch_reserve_crashkernel``: sets ``kernel.crashk_res`` where it succeeds."""
    found = _parse(kernel)
    if found is None:
        return
    size, base, high = found
    arch, memblock = kernel.arch, kernel.memblock
    low_max = _4_GIB if arch.name == "x86_64" else arch.low_address_limit + 1
    high_max = _HIGH_MAX[arch.name]
    if base:
        windows = [(base, base + size)]
    elif high:
        windows = [(low_max, high_max), (0, low_max)]
    else:
        windows = [(0, low_max), (low_max, high_max)]
    for start, end in windows:
        phys = memblock.memblock_phys_alloc_range(size, _ALIGN[arch.name], start, end)
        if phys:
            kernel.crashk_res = [(phys, phys + size)]
            kernel.printk(
                f"crashkernel reserved: 0x{phys:016x} - 0x{phys + size:016x} ({size >> 20} MB)"
            )
            return
    if base:
        kernel.printk("crashkernel reservation failed - memory is in use.")
    else:
        kernel.printk(f"cannot allocate crashkernel (size:0x{size:x})")


def _parse(kernel: Kernel) -> tuple[int, int, bool] | None:
    # parse_crashkernel: (size, base or 0, wanted above 4 GiB), from the last word that fits.
    texts = _WORD.findall(kernel.cmdline)
    plain = [text for text in texts if not _SUFFIX.search(text)]
    system_ram = kernel.memblock.memblock_phys_mem_size()
    high = False
    if plain:
        text = plain[-1]
        size_base = _ranges(kernel, text, system_ram) if ":" in text else _simple(kernel, text)
    else:
        texts = [text for text in texts if text.endswith(",high")]
        if not texts:
            return None
        high = True
        size, end = memparse(texts[-1])
        if not end:
            kernel.printk("crashkernel: memory value expected")
        size_base = (size, 0) if texts[-1][end:] == ",high" else None
    if size_base is None or not size_base[0] or size_base[0] >= system_ram:
        return None
    return (*size_base, high)


def _simple(kernel: Kernel, text: str) -> tuple[int, int] | None:
    size, end = memparse(text)
    if not end:
        kernel.printk("crashkernel: memory value expected")
        return None
    if text[end : end + 1] == "@":
        return size, memparse(text, end + 1)[0]
    if end < len(text):
        kernel.printk(f"crashkernel: unrecognized char: {text[end]}")
        return None
    return size, 0


def _ranges(kernel: Kernel, text: str, system_ram: int) -> tuple[int, int] | None:
    # parse_crashkernel_mem: start-[end]:size,... and an @offset after the last of them.
    printk = kernel.printk
    total = -(-system_ram // (128 * _MIB)) * 128 * _MIB
    chosen = at = 0
    while True:
        start, end = memparse(text, at)
        if end == at:
            printk("crashkernel: Memory value expected")
            return None
        if text[end : end + 1] != "-":
            printk("crashkernel: '-' expected")
            return None
        at = end + 1
        stop = (1 << 64) - 1
        if text[at : at + 1] != ":":
            stop, end = memparse(text, at)
            if end == at:
                printk("crashkernel: Memory value expected")
                return None
            at = end
            if stop <= start:
                printk("crashkernel: end <= start")
                return None
        if text[at : at + 1] != ":":
            printk("crashkernel: ':' expected")
            return None
        size, end = memparse(text, at + 1)
        if end == at + 1:
            printk("crashkernel: Memory value expected")
            return None
        at = end
        if size >= total:
            printk("crashkernel: invalid size")
            return None
        if start <= total < stop:
            chosen = size
            break
        if text[at : at + 1] != ",":
            break
        at += 1
    if not chosen:
        printk("crashkernel size resulted in zero bytes")
        return None
    offset = text.find("@", at)
    if offset < 0:
        return chosen, 0
    base, end = memparse(text, offset + 1)
    if end == offset + 1:
        printk("crashkernel: Memory value expected after '@'")
        return None
    return chosen, base
