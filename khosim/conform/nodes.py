"""``numa_memblks_init``: from node ranges to nodes in memblock.

Models ``mm/numa_memblks.c:numa_cleanup_meminfo``, ``numa_register_meminfo`` and
``numa_clear_kernel_node_hotplug`` @ 7.3. Left out: overlaps between nodes (the kernel gives the
configuration up, and says that it fakes a node) and node alignment finer than a section.
"""

from __future__ import annotations

from khosim.conform.boot_facts import NodeBlock
from khosim.kernel.memblock import NUMA_NO_NODE, PHYS_ADDR_MAX, Memblock, numa_valid_node

__all__ = ("cleanup_meminfo", "numa_memblks_init")


def numa_memblks_init(memblock: Memblock, blocks: tuple[NodeBlock, ...]) -> None:
    """Forget all nodes, then give memory and what is reserved those of ``blocks``."""
    memblock.memblock_set_node(0, PHYS_ADDR_MAX, NUMA_NO_NODE)
    memblock.memblock_set_node(0, PHYS_ADDR_MAX, NUMA_NO_NODE, True)
    meminfo = cleanup_meminfo(memblock, blocks)
    for start, end, nid in meminfo:
        memblock.memblock_set_node(start, end - start, nid)
    for start, end, nid in meminfo:
        memblock.memblock_set_node(start, end - start, nid, True)
    used = {nid for nid in memblock.reserved.nid if numa_valid_node(nid)}
    for start, end, nid in meminfo:
        if nid in used:
            memblock.memblock_clear_hotplug(start, end - start)


def cleanup_meminfo(
    memblock: Memblock, blocks: tuple[NodeBlock, ...]
) -> list[tuple[int, int, int]]:
    """``numa_cleanup_meminfo``: (start, end, nid), trimmed to memory and joined within a node."""
    low, high = memblock.memblock_start_of_DRAM(), memblock.memblock_end_of_DRAM()
    found: list[tuple[int, int, int]] = []
    for block in blocks:
        if memblock.memblock_overlaps_region(memblock.memory, block.start, block.end - block.start):
            start, end = max(block.start, low), min(block.end, high)
            if start < end:
                found.append((start, end, block.nid))
    i = 0
    while i < len(found):
        j = i + 1
        while j < len(found):
            nid = found[i][2]
            start, end = min(found[i][0], found[j][0]), max(found[i][1], found[j][1])
            between = any(
                other != nid and start < last and end > first for first, last, other in found
            )
            if found[j][2] == nid and not between:
                found[i] = (start, end, nid)
                del found[j]
            else:
                j += 1
        i += 1
    return found
