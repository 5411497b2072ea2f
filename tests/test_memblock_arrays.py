"""memblock's arrays: adding, removing, marking, cutting."""

from __future__ import annotations

from typing import Any

import pytest

from khosim.kernel.memblock import (
    MAX_NUMNODES,
    MEMBLOCK_NOMAP,
    MEMBLOCK_RSRV_KERN,
    MEMBLOCK_RSRV_NOINIT,
    NUMA_NO_NODE,
    PHYS_ADDR_MAX,
    Memblock,
)

M = 1 << 20
G = 1 << 30
PAGE = 4096


def machine(**options: Any) -> Memblock:
    """1 GiB of memory on node 0 but for its first page."""
    memblock = Memblock(**options)
    memblock.memblock_add_node(PAGE, G - PAGE, 0, 0)
    return memblock


def test_add_merges_only_what_is_alike() -> None:
    """Touching regions merge if node and flags agree; "no node" differs from "any node"."""
    memblock = Memblock()
    for start, nid in ((0, 0), (1, 0), (2, 1), (4, NUMA_NO_NODE)):
        assert memblock.memblock_add_node(start * M, M, nid, 0) == 0
    assert memblock.memblock_add(3 * M, M) == 0
    assert memblock.memory.rows() == [
        (0, 2 * M, 0, 0),
        (2 * M, M, 0, 1),
        (3 * M, M, 0, MAX_NUMNODES),
        (4 * M, M, 0, NUMA_NO_NODE),
    ]


def test_add_keeps_what_is_there_and_warns() -> None:
    """An addition fills the holes around older regions, which keep node and flags."""
    said: list[str] = []
    memblock = Memblock(on_message=said.append)
    memblock.memblock_reserve_node(2 * M, M, 1, MEMBLOCK_RSRV_NOINIT)
    memblock.memblock_reserve_node(4 * M, M, 0, MEMBLOCK_RSRV_KERN)
    assert memblock.memblock_reserve_node(M, 5 * M, 0, MEMBLOCK_RSRV_KERN) == 0
    assert memblock.reserved.rows() == [
        (M, M, MEMBLOCK_RSRV_KERN, 0),
        (2 * M, M, MEMBLOCK_RSRV_NOINIT, 1),
        (3 * M, 3 * M, MEMBLOCK_RSRV_KERN, 0),
    ]
    assert memblock.memblock_reserved_size() == 5 * M
    assert said == [
        "WARNING: mm/memblock.c:668 at memblock_add_range",
        "WARNING: mm/memblock.c:670 at memblock_add_range",
    ]


def test_warnings_come_twice_when_the_kernel_counts_first() -> None:
    """With little room left in the array the kernel walks twice, and warns twice."""
    said: list[str] = []
    memblock = Memblock(max_regions=5, on_message=said.append)
    for start in (2, 4):
        memblock.memblock_reserve_node(start * M, M, 1, 0)
    memblock.memblock_reserve(3 * M + PAGE, PAGE)
    said.clear()
    assert memblock.memblock_reserve(M, 2 * M) == 0
    assert said == ["WARNING: mm/memblock.c:668 at memblock_add_range"] * 2
    memblock.memblock_add(0, 8 * M)
    memblock.memblock_allow_resize()
    memblock.memblock_reserve(6 * M, M)  # the array is full now
    said.clear()
    assert memblock.memblock_reserve(3 * M + PAGE // 2, M) == 0
    assert memblock.reserved.max == 10
    assert said == ["WARNING: mm/memblock.c:668 at memblock_add_range"] * 2


def test_ranges_are_cut_at_the_end_of_the_address_space() -> None:
    """(0, -1) is all of it but the last byte; nothing wraps around."""
    memblock = Memblock()
    memblock.memblock_add(PAGE, -1)
    assert memblock.memory.rows() == [(PAGE, PHYS_ADDR_MAX - PAGE, 0, MAX_NUMNODES)]
    memblock.memblock_remove(M, PHYS_ADDR_MAX)
    assert memblock.memory.rows() == [(PAGE, M - PAGE, 0, MAX_NUMNODES)]
    assert memblock.memblock_add(PHYS_ADDR_MAX, 100) == 0
    assert memblock.memory.cnt == 1


def test_removing_from_the_middle_splits() -> None:
    """What is left on both sides keeps its attributes; freeing nothing is no error."""
    memblock = machine()
    assert memblock.memblock_remove(M, M) == 0
    assert memblock.memory.rows() == [(PAGE, M - PAGE, 0, 0), (2 * M, G - 2 * M, 0, 0)]
    assert memblock.memblock_phys_mem_size() == G - PAGE - M
    assert memblock.memblock_phys_free(M, M) == 0
    assert memblock.memblock_remove(0, 0) == 0


def test_trim_leaves_the_total_stale() -> None:
    """As in a real boot: a map ending at 0x9fc00, trimmed, still counts as 0x3ff7ec00 bytes."""
    said: list[str] = []
    memblock = Memblock(on_message=said.append)
    memblock.memblock_add(0x1000, 0x9FC00 - 0x1000)
    memblock.memblock_add(0x100000, 0x3FFE0000 - 0x100000)
    memblock.memblock_add(0x50000100, 0x800)
    memblock.memblock_trim_memory(0x1000)
    assert [row[:2] for row in memblock.memory.rows()] == [
        (0x1000, 0x9E000),
        (0x100000, 0x3FEE0000),
    ]
    assert memblock.memblock_phys_mem_size() == 0x3FF7EC00
    memblock.memblock_remove(0, PHYS_ADDR_MAX)
    memblock.memblock_add(0, M)
    assert said == [
        "WARNING: mm/memblock.c:373 at memblock_remove_region",
        "WARNING: mm/memblock.c:625 at memblock_add_range",
    ]
    assert memblock.memblock_phys_mem_size() == M


def test_memory_limit_cuts_both_arrays() -> None:
    """mem= keeps the lowest bytes, counted over holes; a limit beyond the total does nothing."""
    memblock = Memblock()
    memblock.memblock_add(M, M)
    memblock.memblock_add(4 * M, 4 * M)
    memblock.memblock_reserve(5 * M, 2 * M)
    memblock.memblock_enforce_memory_limit(0)
    memblock.memblock_enforce_memory_limit(6 * M)
    assert memblock.memblock_end_of_DRAM() == 8 * M
    memblock.memblock_enforce_memory_limit(3 * M)
    assert [row[:2] for row in memblock.memory.rows()] == [(M, M), (4 * M, 2 * M)]
    assert [row[:2] for row in memblock.reserved.rows()] == [(5 * M, M)]


def test_cap_spares_nomap_regions() -> None:
    """Capping drops mapped memory outside, splits NOMAP regions at the bound and keeps both."""
    said: list[str] = []
    memblock = Memblock(on_message=said.append)
    memblock.memblock_cap_memory_range(0, M)
    assert said == ["memblock_cap_memory_range: No memory registered yet"]
    memblock.memblock_add(0, 8 * M)
    memblock.memblock_mark_nomap(3 * M, 2 * M)
    memblock.memblock_mark_nomap(7 * M, M)
    memblock.memblock_reserve(M, 6 * M)
    memblock.memblock_cap_memory_range(2 * M, 2 * M)
    assert [row[:3] for row in memblock.memory.rows()] == [
        (2 * M, M, 0),
        (3 * M, M, MEMBLOCK_NOMAP),
        (4 * M, M, MEMBLOCK_NOMAP),
        (7 * M, M, MEMBLOCK_NOMAP),
    ]
    assert [row[:2] for row in memblock.reserved.rows()] == [(2 * M, 2 * M)]
    memblock.memblock_mem_limit_remove_map(M)
    assert [row[:2] for row in memblock.memory.rows()][:2] == [(2 * M, M), (3 * M, M)]


@pytest.mark.parametrize("many", [10, 500])
def test_set_node_merges_long_stretches(many: int) -> None:
    """Regions that differed by node alone become one; those of other flags stay."""
    memblock = Memblock(max_regions=4 * many)
    for k in range(many):
        memblock.memblock_add_node(k * M, M, k % 3, 0)
    memblock.memblock_mark_nomap(2 * M, M)
    assert memblock.memblock_set_node(M, (many - 2) * M, 2) == 0
    last = many - 1
    tail = [(last * M, M, 0, last % 3)]
    if last % 3 == 2:
        tail = [(3 * M, (many - 3) * M, 0, 2)]
    else:
        tail.insert(0, (3 * M, (many - 4) * M, 0, 2))
    head = [(0, M, 0, 0), (M, M, 0, 2), (2 * M, M, MEMBLOCK_NOMAP, 2)]
    assert memblock.memory.rows() == head + tail
    assert memblock.memblock_phys_mem_size() == many * M
