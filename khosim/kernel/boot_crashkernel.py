"""Memory set aside for a crash kernel.

Models ``kernel/crash_reserve.c:parse_crashkernel`` and ``reserve_crashkernel_generic`` @ 7.3 with
the limits of ``arch/{x86,arm64}/include/asm/crash_reserve.h``. Left out: ``,cma``.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from khosim.units import memparse

if TYPE_CHECKING:
    from khosim.kernel.kernel import Kernel

__all__ = ("reserve_crashkernel", "reserve_late")

_MIB = 1 << 20
_ALIGN = {"x86_64": 16 * _MIB, "arm64": 2 * _MIB}
_HIGH_MAX = {"x86_64": 64 << 40, "arm64": 1 << 52}
_WORD = re.compile(r"crashkernel=([^ ]*)")
_SUFFIX = re.compile(r",(high|low|cma)$")


def reserve_crashkernel(kernel: Kernel) -> None:
    """``arch_reserve_crashkernel``: sets ``kernel.crashk_res`` where it succeeds.

    A crash kernel above low memory also gets a region below, ``kernel.crashk_low_res``.
    """
    if kernel.release.fix_crash_kernel and kernel.memblock.kho_scratch_only:
        return  # see reserve_late
    found = _parse(kernel)
    if found is None:
        return
    size, base, low_bytes, high = found
    arch, memblock = kernel.arch, kernel.memblock
    low_max, high_max = arch.low_address_limit + 1, _HIGH_MAX[arch.name]
    if base:
        windows = [(base, base + size)]
    elif high:
        windows = [(low_max, high_max), (0, low_max)]
    else:
        windows = [(0, low_max), (low_max, high_max)]
    for start, end in windows:
        phys = memblock.memblock_phys_alloc_range(size, _ALIGN[arch.name], start, end)
        if phys:
            break
        if start == 0 and not high:
            low_bytes = _default_low_bytes(kernel)
    else:
        if base:
            kernel.printk("crashkernel reservation failed - memory is in use.")
        else:
            kernel.printk(f"cannot allocate crashkernel (size:0x{size:x})")
        return
    if phys >= low_max and low_bytes:
        # reserve_crashkernel_low
        low = memblock.memblock_phys_alloc_range(low_bytes, _ALIGN[arch.name], 0, low_max)
        if not low:
            kernel.printk(f"cannot allocate crashkernel low memory (size:0x{low_bytes:x}).")
            memblock.memblock_phys_free(phys, size)
            return
        kernel.printk(
            f"crashkernel low memory reserved: 0x{low:08x} - 0x{low + low_bytes:08x} "
            f"({low_bytes >> 20} MB)"
        )
        kernel.crashk_low_res = [(low, low + low_bytes)]
    kernel.crashk_res = [(phys, phys + size)]
    kernel.printk(f"crashkernel reserved: 0x{phys:016x} - 0x{phys + size:016x} ({size >> 20} MB)")


def reserve_late(kernel: Kernel) -> None:
    """What no kernel does yet: :func:`reserve_crashkernel` where all that came is reserved."""
    memblock = kernel.memblock
    if not kernel.release.fix_crash_kernel or not memblock.kho_scratch_only:
        return
    memblock.kho_scratch_only = False
    reserve_crashkernel(kernel)
    memblock.kho_scratch_only = True


def _default_low_bytes(kernel: Kernel) -> int:
    # DEFAULT_CRASH_KERNEL_LOW_SIZE
    if kernel.arch.name == "arm64":
        return 128 * _MIB
    return max(kernel.config.swiotlb_bytes + 8 * _MIB, 256 * _MIB)


def _parse(kernel: Kernel) -> tuple[int, int, int, bool] | None:
    # parse_crashkernel, from the last word that fits: (size, base or 0, size below, wanted above).
    texts = _WORD.findall(kernel.cmdline)
    plain = [text for text in texts if not _SUFFIX.search(text)]
    system_ram = kernel.memblock.memblock_phys_mem_size()
    high, low_bytes = False, 0
    if plain:
        text = plain[-1]
        size_base = _ranges(kernel, text, system_ram) if ":" in text else _simple(kernel, text)
    else:
        size = _suffixed(kernel, texts, ",high")
        if not size:
            return None
        wanted = _suffixed(kernel, texts, ",low")
        if wanted == -1:
            return None
        low_bytes = _default_low_bytes(kernel) if wanted is None else wanted
        high, size_base = True, (size, 0)
    if size_base is None or not size_base[0] or not 0 < size_base[0] < system_ram:
        return None
    return (*size_base, low_bytes, high)


def _suffixed(kernel: Kernel, texts: list[str], suffix: str) -> int | None:
    # parse_crashkernel_suffix of the last such word: None without one, -1 for -EINVAL.
    found = [text for text in texts if text.endswith(suffix)]
    if not found:
        return None
    size, end = memparse(found[-1])
    if not end:
        kernel.printk("crashkernel: memory value expected")
        return -1
    return size if found[-1][end:] == suffix else -1


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
