"""Answering a logged request with khosim's memblock.

The public allocating calls of ``mm/memblock.c`` @ 7.3, and ``mm/cma.c:cma_alloc_mem``, which logs
no request of its own.
"""

from __future__ import annotations

from collections.abc import Callable

from khosim.conform.boot_facts import BootFacts
from khosim.conform.dmesg_calls import Request
from khosim.kernel.arch import find_arch
from khosim.kernel.cmdline import parse_words
from khosim.kernel.memblock import NUMA_NO_NODE, Memblock
from khosim.units import memparse

__all__ = ("alloc_contiguous", "call_text", "simulate")

_GIB = 1 << 30


def call_text(request: Request) -> str:
    """The call as a person would write it, its caller last."""
    node = f", nid {request.nid}" if request.nid >= 0 else ""
    return (
        f"{request.symbol}({request.size} bytes, align {request.align:#x}{node}) {request.caller}"
    )


def simulate(
    memblock: Memblock, request: Request, scratch_overlap: Callable[[int, int], bool]
) -> int:
    """What memblock answers; 0 if it cannot serve."""
    _, symbol, size, align, start, end, nid, exact, _ = request
    if symbol == "memblock_phys_alloc_range":
        return memblock.memblock_phys_alloc_range(size, align, start, end)
    if symbol == "memblock_alloc_hugetlb":
        return memblock.memblock_alloc_hugetlb(size, nid, exact, scratch_overlap)
    if exact:
        return memblock.memblock_alloc_exact_nid_raw(size, align, start, end, nid)
    return memblock.memblock_alloc_try_nid(size, align, start, end, nid)


def alloc_contiguous(memblock: Memblock, facts: BootFacts, size: int, nid: int) -> int:
    """``cma_alloc_mem``: from 4 GiB upwards if there is room, else top-down in the given range.

    Areas are aligned to a pageblock, those for huge pages to 1 GiB. The default area (no node) ends
    at the DMA limit or where ``cma=`` says; others may lie anywhere.
    """
    arch = find_arch(facts.arch, facts.page_size)
    align = facts.page_size << arch.pageblock_order
    end = memblock.memblock_end_of_DRAM()
    base, limit = 0, end
    words = parse_words(facts.cmdline)
    if any(name == "hugetlb_cma" and value for name, value in words) and size % _GIB == 0:
        align = _GIB
    elif nid == NUMA_NO_NODE:
        limit = min(facts.dma_zone_end, end) if facts.arch == "arm64" else end
        for name, value in words:
            if name == "cma" and value and "@" in value:
                base, limit = _cma_range(value, limit)
    limit &= -align
    if not memblock.bottom_up and limit >= 4 * _GIB + size:
        memblock.memblock_set_bottom_up(True)
        found = memblock.memblock_alloc_range_nid(size, align, 4 * _GIB, limit, nid, True)
        memblock.memblock_set_bottom_up(False)
        if found:
            return found
    return memblock.memblock_alloc_range_nid(size, align, base, limit, nid, True)


def _cma_range(value: str, limit: int) -> tuple[int, int]:
    size, at = memparse(value)
    base, at = memparse(value, at + 1)
    if value[at : at + 1] != "-":
        return base, base + size
    upto, _ = memparse(value, at + 1)
    return base, upto or limit
