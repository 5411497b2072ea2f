"""Asking memblock: sizes, addresses, walks, the dump."""

from __future__ import annotations

from typing import Any

from khosim.kernel.memblock import (
    MEMBLOCK_KHO_SCRATCH,
    MEMBLOCK_NOMAP,
    NUMA_NO_NODE,
    PHYS_ADDR_MAX,
    Memblock,
)

M = 1 << 20
G = 1 << 30
PAGE = 4096

# Lines of a real kernel's dump.
MEMORY_0 = (
    " memory[0x0]\t[0x0000000000001000-0x000000000009efff], 0x000000000009e000 bytes flags: 0x0"
)
MEMORY_1 = (
    " memory[0x1]\t[0x0000000000100000-0x000000003ffdffff], 0x000000003fee0000 bytes"
    " on node 0 flags: 0x40"
)
RESERVED_0 = (
    " reserved[0x0]\t[0x0000000000000000-0x000000000000ffff], 0x0000000000010000 bytes flags: 0x0"
)


def machine(**options: Any) -> Memblock:
    """1 GiB of memory on node 0 but for its first page."""
    memblock = Memblock(**options)
    memblock.memblock_add_node(PAGE, G - PAGE, 0, 0)
    return memblock


def test_queries_at_the_edges() -> None:
    """Half-open ends, regions that touch but differ, and nothing at all."""
    memblock = Memblock()
    assert memblock.memblock_start_of_DRAM() == memblock.memblock_end_of_DRAM() == 0
    assert not memblock.memblock_is_memory(0)
    memblock.memblock_add_node(M, M, 0, 0)
    memblock.memblock_add_node(2 * M, M, 1, MEMBLOCK_NOMAP)
    memblock.memblock_reserve(M + PAGE, PAGE)
    assert (memblock.memblock_start_of_DRAM(), memblock.memblock_end_of_DRAM()) == (M, 3 * M)
    assert [memblock.memblock_is_memory(a) for a in (M - 1, M, 3 * M - 1, 3 * M)] == [
        False,
        True,
        True,
        False,
    ]
    assert memblock.memblock_is_map_memory(2 * M - 1)
    assert not memblock.memblock_is_map_memory(2 * M)
    assert not memblock.memblock_is_map_memory(3 * M)
    assert memblock.memblock_is_reserved(M + PAGE)
    assert not memblock.memblock_is_reserved(M + 2 * PAGE)
    assert memblock.memblock_is_region_memory(M, M)
    assert not memblock.memblock_is_region_memory(M, M + 1)
    assert not memblock.memblock_is_region_memory(0, 2 * M)
    assert memblock.memblock_is_region_reserved(M, PAGE + 1)
    assert not memblock.memblock_is_region_reserved(M, PAGE)
    assert memblock.memblock_is_region_reserved(M + PAGE + 1, 0)
    assert not memblock.memblock_is_region_reserved(M + PAGE, 0)
    assert memblock.memblock_overlaps_region(memblock.memory, 0, PHYS_ADDR_MAX)
    assert memblock.memblock_search_pfn_nid(2 * M // PAGE) == (1, 2 * M // PAGE, 3 * M // PAGE)
    assert memblock.memblock_search_pfn_nid(0) == (NUMA_NO_NODE, 0, 0)


def test_kern_size_counts_up_to_the_limit() -> None:
    """The region across the limit counts in part; other reservations do not count."""
    memblock = machine()
    memblock.memblock_reserve_kern(M, 2 * M)
    memblock.memblock_reserve(4 * M, M)
    memblock.memblock_reserve_kern(6 * M, M)
    sizes = [memblock.memblock_reserved_kern_size(limit) for limit in (M, 2 * M, 5 * M, G)]
    assert sizes == [0, M, 2 * M, 3 * M]
    assert memblock.memblock_reserved_kern_size(G, 0) == 0
    assert memblock.memblock_estimated_nr_free_pages() == (G - PAGE - 3 * M) // PAGE
    memblock.memblock_set_node(0, G, 0, reserved=True)
    assert memblock.memblock_reserved_kern_size(2 * M, 0) == M
    memblock.memblock_reserved_mark_kern(4 * M, M)
    assert memblock.memblock_reserved_kern_size(G, 0) == 4 * M


def test_numa_coverage() -> None:
    """Memory without a node is counted in whole pages against the threshold."""
    said: list[str] = []
    memblock = Memblock(on_message=said.append)
    memblock.memblock_add_node(0, 4 * M, 0, 0)
    memblock.memblock_add(8 * M, 2 * M + 100)
    assert memblock.memblock_validate_numa_coverage(2 * M)
    assert not memblock.memblock_validate_numa_coverage(2 * M - 1)
    assert said == ["NUMA: no nodes coverage for 2MB of 6MB RAM"]


def test_walks() -> None:
    """Free ranges both ways, with the empty one between two reservations that touch."""
    memblock = Memblock()
    memblock.memblock_add_node(M, 4 * M, 0, 0)
    memblock.memblock_add_node(5 * M, M, 1, 0)
    memblock.memblock_mark_nomap(2 * M, PAGE)
    memblock.memblock_reserve(4 * M, PAGE)
    memblock.memblock_reserve_kern(4 * M + PAGE, PAGE)
    hole = 4 * M + PAGE
    free = [
        (M, 2 * M, 0),
        (2 * M + PAGE, 4 * M, 0),
        (hole, hole, 0),
        (hole + PAGE, 5 * M, 0),
        (5 * M, 6 * M, 1),
    ]
    assert list(memblock.for_each_free_mem_range()) == free
    assert list(memblock.for_each_free_mem_range(reverse=True)) == free[::-1]
    assert list(memblock.for_each_free_mem_range(nid=1)) == free[4:]
    assert list(memblock.for_each_free_mem_range(flags=MEMBLOCK_KHO_SCRATCH)) == []
    assert len(list(memblock.for_each_free_mem_range(flags=MEMBLOCK_NOMAP))) == 6
    mapped = [(M, 2 * M), (2 * M + PAGE, 5 * M), (5 * M, 6 * M)]
    assert list(memblock.for_each_mem_range()) == mapped
    assert list(memblock.for_each_mem_range(reverse=True)) == mapped[::-1]
    assert list(memblock.for_each_reserved_mem_range()) == [(4 * M, hole), (hole, hole + PAGE)]
    assert list(memblock.for_each_mem_pfn_range(1)) == [(5 * M // PAGE, 6 * M // PAGE, 1)]
    assert [end - start for start, end, _nid in memblock.for_each_mem_pfn_range()] == [
        256,
        1,
        767,
        256,
    ]


def test_walks_see_what_the_body_reserves() -> None:
    """A loop that reserves the front half of each range still sees every range once."""
    memblock = Memblock()
    memblock.memblock_add_node(M, 2 * M, 0, 0)
    memblock.memblock_add_node(4 * M, 2 * M, 0, 0)
    seen = []
    for start, _end, _nid in memblock.for_each_free_mem_range(reverse=True):
        seen.append(start)
        memblock.memblock_reserve(start, M)
    assert seen == [4 * M, M]


def test_pfn_range_needs_a_whole_page() -> None:
    """Regions without a whole page are passed over; others are rounded inwards."""
    memblock = Memblock()
    memblock.memblock_add_node(100, PAGE, 0, 0)
    memblock.memblock_add_node(3 * PAGE - 1, 2 * PAGE + 2, 0, 0)
    assert list(memblock.for_each_mem_pfn_range()) == [(3, 5, 0)]


def test_dump_reads_like_the_kernels() -> None:
    """The lines that memblock=debug prints, columns and hexadecimal zeros included."""
    memblock = Memblock()
    memblock.memblock_add(0x1000, 0x9E000)
    memblock.memblock_add_node(0x100000, 0x3FEE0000, 0, MEMBLOCK_KHO_SCRATCH)
    memblock.memblock_reserve(0, 0x10000)
    assert memblock.memblock_dump_all() == [
        "MEMBLOCK configuration:",
        " memory size = 0x000000003ff7e000 reserved size = 0x0000000000010000",
        " memory.cnt  = 0x2",
        MEMORY_0,
        MEMORY_1,
        " reserved.cnt  = 0x1",
        RESERVED_0,
    ]
