"""Allocating from memblock: where, for whom, and what it says when it cannot."""

from __future__ import annotations

from typing import Any

import pytest

from khosim.errors import KernelPanic
from khosim.kernel.memblock import (
    MAX_NUMNODES,
    MEMBLOCK_ALLOC_ACCESSIBLE,
    MEMBLOCK_ALLOC_NOLEAKTRACE,
    MEMBLOCK_DRIVER_MANAGED,
    MEMBLOCK_MIRROR,
    MEMBLOCK_RSRV_HUGETLB,
    MEMBLOCK_RSRV_KERN,
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


def test_allocation_is_top_down_and_merges() -> None:
    """Each allocation lies below the one before; equal attributes make one region."""
    memblock = machine()
    assert memblock.memblock_alloc(PAGE, PAGE) == G - PAGE
    assert memblock.memblock_alloc(100, 64) == G - PAGE - 128
    assert memblock.memblock_alloc_raw(28, 1) == G - PAGE - 28
    assert memblock.memblock_phys_alloc(M, M) == G - 2 * M
    assert memblock.allocations == [
        (G - PAGE, PAGE),
        (G - PAGE - 128, 100),
        (G - PAGE - 28, 28),
        (G - 2 * M, M),
    ]
    assert memblock.reserved.rows() == [
        (G - 2 * M, M, MEMBLOCK_RSRV_KERN, NUMA_NO_NODE),
        (G - PAGE - 128, 128 + PAGE, MEMBLOCK_RSRV_KERN, NUMA_NO_NODE),
    ]


def test_bottom_up_never_uses_the_first_page() -> None:
    """From below, the lowest legal place is the second page."""
    memblock = Memblock()
    memblock.memblock_add_node(0, G, 0, 0)
    memblock.memblock_set_bottom_up(True)
    assert memblock.memblock_alloc(64, 64) == PAGE
    assert memblock.memblock_alloc(64, M) == M
    assert memblock.memblock_alloc(64, 64) == PAGE + 64


def test_limits() -> None:
    """The current limit binds 0, 1 and anything above it; a lower bound may be given up."""
    memblock = machine()
    memblock.memblock_set_current_limit(64 * M)
    assert memblock.memblock_get_current_limit() == 64 * M
    assert memblock.memblock_phys_alloc_range(M, M, 0, MEMBLOCK_ALLOC_ACCESSIBLE) == 63 * M
    assert memblock.memblock_phys_alloc_range(M, M, 0, MEMBLOCK_ALLOC_NOLEAKTRACE) == 62 * M
    assert memblock.memblock_phys_alloc_range(M, M, 0, G) == G - M
    assert memblock.memblock_alloc_try_nid(M, M, 0, G, 0) == 61 * M
    assert memblock.memblock_phys_alloc_range(M, M, 62 * M, 64 * M) == 0
    assert memblock.memblock_alloc_from(M, M, 62 * M) == 60 * M
    memblock.memblock_set_current_limit(PHYS_ADDR_MAX)
    memblock.memblock_add_node(4 * G, G, 0, 0)
    assert memblock.memblock_alloc(M, M) == 5 * G - M
    assert memblock.memblock_alloc_low(M, M) == G - 2 * M


def test_nodes() -> None:
    """A full node falls back to any node and then loses the name; exact does not fall back."""
    memblock = Memblock()
    memblock.memblock_add_node(PAGE, 2 * M - PAGE, 0, 0)
    memblock.memblock_add_node(2 * M, 4 * M, 1, 0)
    assert memblock.memblock_alloc_node(M, M, 0) == M
    assert memblock.memblock_alloc_exact_nid_raw(M, M, 0, 0, 0) == 0
    assert memblock.memblock_alloc_try_nid_raw(M, M, 0, 0, 0) == 5 * M
    assert memblock.memblock_phys_alloc_try_nid(M, M, 1) == 4 * M
    assert memblock.memblock_alloc_range_nid(M, M, 0, 0, MAX_NUMNODES, True) == 3 * M
    assert memblock.memblock_alloc_internal(M, M, 0, 0, 1, True) == 2 * M
    assert memblock.reserved.rows() == [
        (M, M, MEMBLOCK_RSRV_KERN, 0),
        (2 * M, M, MEMBLOCK_RSRV_KERN, 1),
        (3 * M, M, MEMBLOCK_RSRV_KERN, MAX_NUMNODES),
        (4 * M, M, MEMBLOCK_RSRV_KERN, 1),
        (5 * M, M, MEMBLOCK_RSRV_KERN, NUMA_NO_NODE),
    ]
    assert memblock.memblock_reserved_kern_size(PHYS_ADDR_MAX, 1) == 2 * M
    with pytest.raises(KernelPanic, match=r"^setup: Failed to allocate 0x0000000000200000 bytes$"):
        memblock.memblock_alloc_or_panic(2 * M, M, "setup")
    assert memblock.memblock_alloc_or_panic(PAGE, PAGE, "setup") == M - PAGE


def test_flags_that_hide_memory() -> None:
    """NOMAP and driver-managed memory is never allocated, hotplug memory not with movable_node."""
    for movable, expected in ((False, 3 * M), (True, 2 * M)):
        memblock = Memblock(movable_node=movable)
        memblock.memblock_add_node(0, 5 * M, 0, 0)
        memblock.memblock_add_node(5 * M, M, 0, MEMBLOCK_DRIVER_MANAGED)
        memblock.memblock_mark_nomap(4 * M, M)
        memblock.memblock_mark_hotplug(3 * M, M)
        assert memblock.memblock_alloc(M, M) == expected
        memblock.memblock_clear_nomap(4 * M, M)
        memblock.memblock_clear_hotplug(3 * M, M)
        assert memblock.memblock_alloc(M, M) == 4 * M


def test_scratch_only() -> None:
    """Confined to scratch, nothing else is used, not even for a node that has none."""
    memblock = machine()
    memblock.memblock_mark_kho_scratch(16 * M, 2 * M)
    memblock.memblock_set_kho_scratch_only()
    assert memblock.memblock_alloc_node(M, M, 1) == 17 * M
    assert memblock.memblock_alloc(2 * M, PAGE) == 0
    memblock.memblock_clear_kho_scratch(16 * M, 2 * M)
    assert memblock.memblock_alloc(PAGE, PAGE) == 0
    memblock.memblock_clear_kho_scratch_only()
    assert memblock.memblock_alloc(2 * M, PAGE) == G - 2 * M


def test_mirror_is_preferred_then_given_up() -> None:
    """Marking needs kernelcore=mirror; then mirrored memory comes first, with a word if full."""
    memblock = machine()
    assert memblock.memblock_mark_mirror(M, M) == 0
    assert memblock.memory.cnt == 1
    said: list[str] = []
    memblock = machine(mirrored_kernelcore=True, on_message=said.append)
    assert memblock.memblock_mark_mirror(M, M) == 0
    assert memblock.memory.rows()[1] == (M, M, MEMBLOCK_MIRROR, 0)
    assert memblock.memblock_alloc(M, PAGE) == M
    assert said == []
    assert memblock.memblock_alloc(PAGE, PAGE) == G - PAGE
    assert said == ["Could not allocate 0x0000000000001000 bytes of mirrored memory"]
    assert memblock.memblock_alloc_hugetlb(2 * M, 0, True, lambda _phys, _len: False) == G - 4 * M
    assert len(said) == 1
    assert memblock.memblock_alloc_try_nid(2 * G, PAGE, 0, 0, 0) == 0
    assert len(said) == 2
    assert memblock.memblock_alloc_from(2 * G, PAGE, M) == 0
    assert len(said) == 4


def test_hugetlb_steps_around_scratch() -> None:
    """A huge page that would meet scratch is looked for further on, then on other nodes."""

    def overlap(phys: int, len_bytes: int) -> bool:
        return phys < 7 * M and phys + len_bytes > 5 * M

    flags = MEMBLOCK_RSRV_KERN | MEMBLOCK_RSRV_HUGETLB
    memblock = Memblock()
    memblock.memblock_add_node(2 * M, 6 * M, 0, 0)
    memblock.memblock_add_node(8 * M, 4 * M, 1, 0)
    memblock.memblock_set_bottom_up(True)
    assert memblock.memblock_alloc_hugetlb(2 * M, 0, True, overlap) == 2 * M
    assert memblock.memblock_alloc_hugetlb(2 * M, 0, True, overlap) == 0
    assert memblock.memblock_alloc_hugetlb(2 * M, 0, False, overlap) == 8 * M
    memblock.memblock_phys_free(0, G)
    memblock.memblock_set_bottom_up(False)
    assert memblock.memblock_alloc_hugetlb(2 * M, 0, True, overlap) == 2 * M
    assert memblock.memblock_alloc_hugetlb(2 * M, 0, False, overlap) == 10 * M
    assert memblock.reserved.rows() == [
        (2 * M, 2 * M, flags, 0),
        (10 * M, 2 * M, flags, NUMA_NO_NODE),
    ]
    assert memblock.memblock_reserved_hugetlb_size(11 * M) == 3 * M
    assert memblock.memblock_reserved_hugetlb_size(11 * M, 0) == 2 * M


def test_odd_sizes_and_alignments() -> None:
    """Size 0 "succeeds" without reserving; alignment 0 is a cache line; 3 * PAGE masks bits."""
    said: list[str] = []
    memblock = machine(on_message=said.append, smp_cache_bytes=128)
    assert memblock.memblock_alloc(0, 64) == G
    assert memblock.reserved.cnt == 0
    assert memblock.allocations == []
    assert memblock.memblock_alloc(64, 0) == G - 128
    assert len(said) == 1
    # round_down(x, 3 * PAGE) in C clears the bits of 3 * PAGE - 1: 0x2fff.
    assert memblock.memblock_alloc(PAGE, 3 * PAGE) == (G - 128 - PAGE) & ~0x2FFF
    memblock.memblock_set_bottom_up(True)
    assert memblock.memblock_alloc(0, PAGE) == PAGE
    assert memblock.memblock_alloc(PAGE, 3 * PAGE) == 0x3000
    assert memblock.memblock_alloc_range_nid(2 * G, 64, 0, PHYS_ADDR_MAX, -1, False) == 0
