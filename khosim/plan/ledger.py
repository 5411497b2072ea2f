"""Who has reserved what at boot: ranges and their owners, and what each costs in scratch.

``mm/memblock.c:memblock_reserved_kern_size`` @ 7.3 adds up what boot has taken for the kernel's own
use; ``kho_reserve_scratch`` makes scratch so many percent of it: in lowmem or global, and once more
on the node where memblock knows one.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

from khosim.kernel.memblock import (
    MEMBLOCK_RSRV_HUGETLB,
    MEMBLOCK_RSRV_KERN,
    Memblock,
    numa_valid_node,
)

__all__ = ("Ledger", "Owner", "owner_of", "owners_in")

SCRATCH = "scratch"
OTHER = "everything else"

_OWNERS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("log buffer", ("setup_log_buf",)),
    ("huge pages", ("hugetlb", "alloc_bootmem", "__alloc_bootmem_huge")),
    (
        "struct pages",
        ("sparse_", "memblocks_present", "memory_present", "vmemmap_", "__populate_", "memmap_"),
    ),
    ("per-cpu areas", ("setup_per_cpu_areas", "pcpu_")),
    ("hash tables", ("alloc_large_system_hash", "vfs_caches_init_early")),
    ("bounce buffers", ("swiotlb",)),
    (
        "page tables",
        ("init_mem_mapping", "alloc_low_page", "early_pgtable", "paging_init", "trap_init"),
    ),
    ("crash kernel", ("reserve_crashkernel", "arch_reserve_crashkernel")),
    ("CMA area", ("cma_", "__cma_", "dma_contiguous_reserve")),
    ("reserve_mem", ("reserve_mem", "parse_args")),
    ("device tree", ("unflatten_device_tree", "early_init_dt_alloc")),
    ("node data", ("alloc_node_data", "alloc_offline_node_data", "initmem_init", "bootmem_init")),
    (SCRATCH, ("kho_memory_init", "kho_reserve_scratch")),
)


def owner_of(symbol: str) -> str:
    """What a kernel function that takes memory at boot takes it for."""
    for owner, prefixes in _OWNERS:
        if symbol.startswith(prefixes):
            return owner
    return OTHER


class Ledger:
    """Disjoint ranges of addresses (bytes), each with its owner; what is freed is owned no more."""

    __slots__ = ("_ends", "_owners", "_starts")

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []
        self._owners: list[str] = []

    def take(self, start: int, end: int, owner: str) -> None:
        """[start, end) belongs to ``owner`` from now on."""
        if start < end:
            self.free(start, end)
            at = bisect_left(self._starts, start)
            self._starts.insert(at, start)
            self._ends.insert(at, end)
            self._owners.insert(at, owner)

    def free(self, start: int, end: int) -> None:
        """Nobody owns [start, end) any more."""
        first = bisect_left(self._ends, start + 1)
        last = bisect_left(self._starts, end)
        if first >= last:
            return
        kept: list[tuple[int, int, str]] = []
        if self._starts[first] < start:
            kept.append((self._starts[first], start, self._owners[first]))
        if self._ends[last - 1] > end:
            kept.append((end, self._ends[last - 1], self._owners[last - 1]))
        self._starts[first:last] = [piece[0] for piece in kept]
        self._ends[first:last] = [piece[1] for piece in kept]
        self._owners[first:last] = [piece[2] for piece in kept]

    def within(self, start: int, end: int) -> list[tuple[int, int, str]]:
        """The pieces of [start, end) with their owners; gaps belong to nobody in particular."""
        pieces: list[tuple[int, int, str]] = []
        at = start
        for i in range(bisect_left(self._ends, start + 1), bisect_left(self._starts, end)):
            low, high = max(self._starts[i], start), min(self._ends[i], end)
            if at < low:
                pieces.append((at, low, OTHER))
            pieces.append((low, high, self._owners[i]))
            at = high
        if at < end:
            pieces.append((at, end, OTHER))
        return pieces


@dataclass(frozen=True, slots=True)
class Owner:
    """What one owner has reserved: bytes in all, below the low limit, and on known nodes."""

    name: str
    reserved_bytes: int
    low_bytes: int
    node_bytes: int

    def scratch_bytes(self, scale_percent: int) -> int:
        """Its part of scratch before rounding: counted as low or global, and again on a node."""
        return (self.reserved_bytes + self.node_bytes) * scale_percent // 100


def owners_in(
    memblock: Memblock, ledger: Ledger, low_limit: int, *, excludes_hugetlb: bool
) -> tuple[Owner, ...]:
    """The owners of all that counts when scratch is sized, the largest first.

    ``memblock`` may hold scratch already; it is left out, as it is nobody's reason for itself.
    """
    totals: dict[str, list[int]] = {}
    reserved = memblock.reserved
    for start, end, flags, nid in zip(
        reserved.base, reserved.end, reserved.flags, reserved.nid, strict=True
    ):
        if not flags & MEMBLOCK_RSRV_KERN:
            continue
        if excludes_hugetlb and flags & MEMBLOCK_RSRV_HUGETLB:
            continue
        for low, high, owner in ledger.within(start, end):
            if owner == SCRATCH:
                continue
            total = totals.setdefault(owner, [0, 0, 0])
            total[0] += high - low
            total[1] += max(0, min(high, low_limit) - low)
            total[2] += high - low if numa_valid_node(nid) else 0
    owners = [Owner(name, *total) for name, total in totals.items()]
    return tuple(sorted(owners, key=lambda owner: (-owner.reserved_bytes, owner.name)))
