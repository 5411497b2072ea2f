"""Names in the "memblock" subtree, which describes ``reserve_mem`` regions.

From ``include/linux/kho/abi/memblock.h`` @ 7.3; the subtree is an FDT of one page: a node per
region with the properties ``start`` and ``size`` (u64, native byte order, bytes).
"""

from __future__ import annotations

__all__ = (
    "MEMBLOCK_KHO_FDT",
    "MEMBLOCK_KHO_NODE_COMPATIBLE",
    "RESERVE_MEM_KHO_NODE_COMPATIBLE",
)

MEMBLOCK_KHO_FDT = "memblock"
MEMBLOCK_KHO_NODE_COMPATIBLE = "memblock-v1"
RESERVE_MEM_KHO_NODE_COMPATIBLE = "reserve-mem-v1"
