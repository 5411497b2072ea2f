"""Corners of memblock that only a changed memblock shows: each was once untested, or not soon."""

from __future__ import annotations

from errno import ENOMEM
from random import Random
from typing import Any

import pytest

from khosim.kernel.memblock import (
    MEMBLOCK_NONE,
    MEMBLOCK_RSRV_KERN,
    MEMBLOCK_RSRV_NOINIT,
    NUMA_NO_NODE,
    PHYS_ADDR_MAX,
    Memblock,
)

PAGE = 4096


def machine(nr_pages: int = 4096, **options: Any) -> Memblock:
    """Memory on node 0 without its first page; arrays may grow."""
    memblock = Memblock(**options)
    memblock.memblock_add_node(PAGE, (nr_pages - 1) * PAGE, 0, MEMBLOCK_NONE)
    memblock.memblock_allow_resize()
    return memblock


def state(memblock: Memblock) -> tuple[Any, ...]:
    """All that two memblocks must agree on."""
    array = memblock.reserved
    return array.rows(), array.max, array.total_size, array.array_phys, memblock.allocations


def assert_bulk_is_each(
    before: list[tuple[int, int, int, int]],
    blocks: list[tuple[int, int]],
    room: int,
    noinit: bool,
) -> None:
    """Blocks reserved at once and one by one, after the same reservations, all in bytes."""
    sides = []
    for bulk in (False, True):
        memblock = machine(reserved_max=room)
        heard: list[Any] = []
        for start, size, nid, flags in before:
            assert memblock.memblock_reserve_node(start, size, nid, flags) == 0
        memblock.trace = lambda *event, heard=heard: heard.append(event)
        if bulk:
            starts, ends = [s for s, _ in blocks], [s + size for s, size in blocks]
            memblock.memblock_reserve_many(starts, ends, noinit)
        else:
            for start, size in blocks:
                memblock.memblock_reserve(start, size)
                if noinit:
                    memblock.memblock_reserved_mark_noinit(start, size)
        sides.append((state(memblock), heard))
    assert sides[0] == sides[1]


@pytest.mark.parametrize("noinit", [True, False])
@pytest.mark.parametrize("flags", [MEMBLOCK_NONE, MEMBLOCK_RSRV_NOINIT])
def test_blocks_at_once_join_what_was_reserved(noinit: bool, flags: int) -> None:
    """Blocks that touch a reservation below, above or on both sides, for every room there is."""
    old = [(slot * 8 * PAGE, PAGE, NUMA_NO_NODE, flags) for slot in range(1, 12)]
    old[4:6] = [(*span[:2], 0, flags) for span in old[4:6]]  # of a node: they join nobody
    above = [(start + PAGE, PAGE) for start, *_ in old[::2]]
    below = [(start - 2 * PAGE, 2 * PAGE) for start, *_ in old[1::3]]
    apart = [((1000 + 3 * n) * PAGE, PAGE * (1 + n % 3)) for n in range(30)]
    both = [(8 * PAGE * 2 + 2 * PAGE, 6 * PAGE), (8 * PAGE * 6 + 2 * PAGE, 6 * PAGE)]
    blocks = [*above, *apart[:9], *below, *apart[9:], *both]
    for room in range(12, 54):
        assert_bulk_is_each(old, blocks, room, noinit)


def test_blocks_at_once_of_all_sorts() -> None:
    """Drawn: sorted and not, touching and overlapping, with little room and much."""
    random = Random("blocks")
    kinds = (MEMBLOCK_NONE, MEMBLOCK_RSRV_KERN, MEMBLOCK_RSRV_NOINIT)
    for n in range(60):
        reach = random.choice((60, 200, 2000))
        pfns = random.sample(range(2, 2 + reach), random.randint(25, 50))
        if n % 2:
            pfns.sort()
        longest = random.choice((1, 1, 3))
        blocks = [(pfn * PAGE, random.randint(1, longest) * PAGE) for pfn in pfns]
        before = [
            (
                random.randrange(2, 2 + reach) * PAGE,
                random.randint(1, 2) * PAGE,
                random.choice((NUMA_NO_NODE, 0)),
                random.choice(kinds),
            )
            for _ in range(random.randrange(8))
        ]
        assert_bulk_is_each(before, blocks, random.choice((14, 20, 33, 60, 500)), n % 3 > 0)


def test_a_block_that_is_itself_the_only_room() -> None:
    """An array that cannot grow beside one block may grow beside the next."""
    memblock = machine(8, reserved_max=2)
    memblock.memblock_reserve_kern(0, 5 * PAGE)
    memblock.memblock_reserve_kern(6 * PAGE, 2 * PAGE)
    page = 5 * PAGE
    memblock.memblock_reserve_many([page + 1024, 100 * PAGE], [page + 2048, 101 * PAGE], False)
    assert (memblock.reserved.array_phys, memblock.reserved.max) == (page, 4)
    assert memblock.reserved.rows() == [
        (0, 8 * PAGE, MEMBLOCK_RSRV_KERN, NUMA_NO_NODE),
        (100 * PAGE, PAGE, MEMBLOCK_NONE, NUMA_NO_NODE),
    ]


def test_a_reservation_that_leaves_its_memory_hides_nothing_else() -> None:
    """What is free ends where a reservation begins, though that ends behind the memory."""
    memblock = Memblock()
    memblock.memblock_add_node(PAGE, 2 * PAGE, 0, MEMBLOCK_NONE)
    memblock.memblock_add_node(5 * PAGE, PAGE, 1, MEMBLOCK_NONE)
    memblock.memblock_add_node(8 * PAGE, PAGE, 0, MEMBLOCK_NONE)
    memblock.memblock_reserve(2 * PAGE, 2 * PAGE)
    memblock.memblock_reserve(4 * PAGE + 64, 3 * PAGE)
    expected = [(PAGE, 2 * PAGE, 0), (8 * PAGE, 9 * PAGE, 0)]
    assert list(memblock.for_each_free_mem_range()) == expected
    assert list(memblock.for_each_free_mem_range(reverse=True)) == expected[::-1]


def test_regions_removed_together_leave_the_sum_right() -> None:
    """The running sum loses each of the regions that go."""
    memblock = machine()
    for pfn in (3, 5, 9, 14):
        memblock.memblock_reserve(pfn * PAGE, 2 * PAGE - 64 * pfn)
    for nr_gone, left in ((2, 9 + 14), (1, 14), (1, 0)):
        assert memblock.reserved.total_size == memblock.memblock_reserved_size()
        first = memblock.reserved.base[0]
        memblock.memblock_phys_free(first, memblock.reserved.end[nr_gone - 1] - first)
        expected = 2 * PAGE * memblock.reserved.cnt - 64 * left
        assert memblock.memblock_reserved_size() == expected


def test_an_array_grows_beside_a_range_that_runs_to_the_end() -> None:
    """A range that would pass the end of the address space is avoided as if it were cut there."""
    memblock = machine(reserved_max=3)
    memblock.memblock_reserve(20 * PAGE, PAGE)
    memblock.memblock_reserve(30 * PAGE, PAGE)
    assert memblock.memblock_reserved_mark_kern(25 * PAGE, PHYS_ADDR_MAX) == 0
    assert memblock.reserved.array_phys == 24 * PAGE
    assert memblock.reserved.rows() == [
        (20 * PAGE, PAGE, MEMBLOCK_NONE, NUMA_NO_NODE),
        (24 * PAGE, PAGE, MEMBLOCK_RSRV_KERN, NUMA_NO_NODE),
        (30 * PAGE, PAGE, MEMBLOCK_RSRV_KERN, NUMA_NO_NODE),
    ]


def test_a_search_of_all_nodes_is_made_once() -> None:
    """An allocation for no node that cannot be noted does not try the other nodes as well."""
    said: list[str] = []
    memblock = machine(16, reserved_max=1, on_message=said.append)
    memblock.memblock_set_current_limit(2 * PAGE)
    memblock.memblock_reserve_node(PAGE + 128, PAGE - 128, 0, MEMBLOCK_NONE)
    assert memblock.memblock_phys_alloc(64, 64) == 0
    assert said == ["memblock: Failed to double reserved array from 1 to 2 entries !"]
    assert memblock.memblock_alloc_try_nid(64, 64, 0, 0, 0) == 0
    assert len(said) == 3  # node 0 first, then any
    assert memblock.memblock_reserve(0, 64) == -ENOMEM


@pytest.mark.parametrize(("room", "nr_told"), [(4, 2), (5, 1)])
def test_mixed_flags_are_told_twice_where_the_room_is_short(room: int, nr_told: int) -> None:
    """The kernel counts what it will insert before it does unless twice the regions fit."""
    said: list[str] = []
    memblock = machine(reserved_max=room, on_message=said.append)
    memblock.memblock_reserve(20 * PAGE, PAGE)
    memblock.memblock_reserve(30 * PAGE, PAGE)
    memblock.memblock_reserve_kern(29 * PAGE, 2 * PAGE)
    assert said == ["WARNING: mm/memblock.c:670 at memblock_add_range"] * nr_told


def test_reserved_pages_of_node_0() -> None:
    """Node 0 is a node: neither a region's own nor its memory's gives way to another."""
    memblock = Memblock()
    memblock.memblock_add_node(PAGE, PAGE, 0, MEMBLOCK_NONE)
    memblock.memblock_add_node(2 * PAGE, PAGE, 1, MEMBLOCK_NONE)
    memblock.memblock_reserve(PAGE, 64)
    memblock.memblock_reserve_node(2 * PAGE, 64, 0, MEMBLOCK_NONE)
    told = memblock.reserved_ranges(first_online_node=1)
    assert told == [(1, 2, 0, MEMBLOCK_NONE), (2, 3, 0, MEMBLOCK_NONE)]
