"""memblock: the allocator of a kernel that has no page allocator yet.

Two sorted arrays of regions, *memory* and *reserved*; what is memory and not reserved is free.
Allocating is finding a free range and reserving it. One :class:`Memblock` belongs to one kernel
generation and dies with it.

Source: ``mm/memblock.c``, ``include/linux/memblock.h`` @ 7.3. In layers, each module a class on top
of the one before:

* :mod:`~khosim.kernel.memblock_regions`: one array;
* :mod:`~khosim.kernel.memblock_iter`: walking both, finding a place;
* :mod:`~khosim.kernel.memblock_core`: the state, adding and isolating, doubling a full array;
* :mod:`~khosim.kernel.memblock_arrays`: add, remove, reserve, mark, cut;
* :mod:`~khosim.kernel.memblock_alloc`: allocate;
* :mod:`~khosim.kernel.memblock_query`: ask;
* :mod:`~khosim.kernel.memblock_free`: hand over to the page allocator;
* :mod:`~khosim.kernel.memblock_bulk`: thousands of reservations at once.

Left out: 32-bit addresses, builds without NUMA, kmemleak, what memblock does after slab is up.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from khosim.kernel.memblock_alloc import ARCH_LOW_ADDRESS_LIMIT
from khosim.kernel.memblock_core import MEMBLOCK_ALLOC_ACCESSIBLE, MEMBLOCK_ALLOC_NOLEAKTRACE
from khosim.kernel.memblock_free import (
    MAX_PAGE_ORDER,
    MemblockFree,
    split_free_pages,
    split_free_runs,
)
from khosim.kernel.memblock_regions import (
    MAX_NUMNODES,
    MEMBLOCK_DRIVER_MANAGED,
    MEMBLOCK_HOTPLUG,
    MEMBLOCK_KHO_SCRATCH,
    MEMBLOCK_MIRROR,
    MEMBLOCK_NOMAP,
    MEMBLOCK_NONE,
    MEMBLOCK_RSRV_HUGETLB,
    MEMBLOCK_RSRV_KERN,
    MEMBLOCK_RSRV_NOINIT,
    NUMA_NO_NODE,
    PHYS_ADDR_MAX,
    Region,
    RegionArray,
    numa_valid_node,
)

if TYPE_CHECKING:
    from khosim.kernel.memblock_bulk import Addresses

__all__ = (
    "ARCH_LOW_ADDRESS_LIMIT",
    "MAX_NUMNODES",
    "MAX_PAGE_ORDER",
    "MEMBLOCK_ALLOC_ACCESSIBLE",
    "MEMBLOCK_ALLOC_ANYWHERE",
    "MEMBLOCK_ALLOC_NOLEAKTRACE",
    "MEMBLOCK_DRIVER_MANAGED",
    "MEMBLOCK_HOTPLUG",
    "MEMBLOCK_KHO_SCRATCH",
    "MEMBLOCK_MIRROR",
    "MEMBLOCK_NOMAP",
    "MEMBLOCK_NONE",
    "MEMBLOCK_RSRV_HUGETLB",
    "MEMBLOCK_RSRV_KERN",
    "MEMBLOCK_RSRV_NOINIT",
    "NUMA_NO_NODE",
    "PHYS_ADDR_MAX",
    "Memblock",
    "Region",
    "RegionArray",
    "numa_valid_node",
    "split_free_pages",
    "split_free_runs",
)

MEMBLOCK_ALLOC_ANYWHERE = PHYS_ADDR_MAX


class Memblock(MemblockFree):
    """The whole of memblock for one kernel generation.

    Methods bear the kernel functions' names and return what those return. ``memory`` and
    ``reserved`` are the arrays, ``allocations`` lists ``(phys, len_bytes)`` of every allocation
    made, doubled arrays included, in order.
    """

    __slots__ = ()

    def memblock_reserve_many(
        self, starts: Addresses, ends: Addresses, noinit: bool = True
    ) -> None:
        """Reserve each [start, end) in turn and mark it ``MEMBLOCK_RSRV_NOINIT`` if ``noinit``.

        The same arrays, doublings and panics as one :meth:`memblock_reserve` and
        :meth:`memblock_reserved_mark_noinit` per block (``kho_preserved_memory_reserve``), in a
        fraction of the time. :class:`ValueError` for a block that ends before it starts.
        """
        from khosim.kernel.memblock_bulk import reserve_many

        reserve_many(self, starts, ends, noinit)
