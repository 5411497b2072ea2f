"""memblock as a whole: who listens, what it hands to the page allocator, many calls at once."""

from __future__ import annotations

from typing import Any

import pytest

from khosim.kernel.memblock import (
    MEMBLOCK_NOMAP,
    MEMBLOCK_RSRV_KERN,
    MEMBLOCK_RSRV_NOINIT,
    NUMA_NO_NODE,
    Memblock,
    split_free_pages,
    split_free_runs,
)

M = 1 << 20
G = 1 << 30
PAGE = 4096


def machine(**options: Any) -> Memblock:
    """1 GiB of memory on node 0 but for its first page."""
    memblock = Memblock(**options)
    memblock.memblock_add_node(PAGE, G - PAGE, 0, 0)
    return memblock


def test_free_ranges_and_reserved_ranges() -> None:
    """Whole free pages, in order; reservations rounded outwards, with the node of their memory."""
    memblock = Memblock(movable_node=True)
    memblock.memblock_add_node(PAGE, 15 * PAGE, 0, 0)
    memblock.memblock_add_node(16 * PAGE, 16 * PAGE, 1, 0)
    memblock.memblock_mark_hotplug(16 * PAGE, 16 * PAGE)
    memblock.memblock_mark_nomap(2 * PAGE, PAGE)
    memblock.memblock_set_kho_scratch_only()
    memblock.memblock_reserve(0, 100)  # not memory: keeps no node
    memblock.memblock_reserve(5 * PAGE + 10, PAGE)
    memblock.memblock_reserve_kern(15 * PAGE, 2 * PAGE)  # across both nodes
    memblock.memblock_reserve(20 * PAGE, PAGE)
    memblock.memblock_reserved_mark_noinit(20 * PAGE, PAGE)
    assert memblock.free_ranges() == [
        (1, 2, 0),
        (3, 5, 0),
        (7, 15, 0),
        (17, 20, 1),
        (21, 32, 1),
    ]
    assert memblock.free_ranges(max_low_pfn=24)[-1] == (21, 24, 1)
    assert not memblock.kho_scratch_only
    kern = MEMBLOCK_RSRV_KERN
    expected = [
        (2, 3, 0, MEMBLOCK_NOMAP),
        (0, 1, 7, 0),
        (5, 7, 0, 0),
        (15, 16, 0, kern),
        (16, 17, 1, kern),
    ]
    assert memblock.reserved_ranges(first_online_node=7) == expected
    noinit = (20, 21, 1, MEMBLOCK_RSRV_NOINIT)
    assert memblock.reserved_ranges(include_noinit=True, first_online_node=7)[-1] == noinit


def test_free_ranges_repeat_when_the_array_doubles() -> None:
    """An array that doubles while nodes are set is itself given a node."""
    memblock = Memblock(reserved_max=4)
    memblock.memblock_add_node(PAGE, 63 * PAGE, 0, 0)
    memblock.memblock_add_node(64 * PAGE, 64 * PAGE, 1, 0)
    memblock.memblock_allow_resize()
    memblock.memblock_set_current_limit(32 * PAGE)
    for pfn in (40, 80, 100):
        memblock.memblock_reserve(pfn * PAGE, PAGE)
    memblock.free_ranges()
    assert memblock.reserved.max == 8
    assert [(base // PAGE, nid) for base, _size, _flags, nid in memblock.reserved.rows()] == [
        (31, 0),
        (40, 0),
        (80, 1),
        (100, 1),
    ]


def test_split_into_orders() -> None:
    """Largest aligned blocks first up, then down; a start at 0 counts as aligned to all."""
    assert list(split_free_pages(0, 5)) == [(0, 2), (4, 0)]
    assert list(split_free_pages(3, 30, 3)) == [(3, 0), (4, 2), (8, 3), (16, 3), (24, 2), (28, 1)]
    assert list(split_free_pages(7, 7)) == []
    tib = list(split_free_runs(1, (1 << 28) + 3))
    assert [order for _pfn, order, _nr in tib] == [*range(10), 10, 1, 0]
    assert tib[10] == (1024, 10, (1 << 18) - 1)
    assert sum(nr << order for _pfn, order, nr in tib) == (1 << 28) + 2


def test_trace_hears_each_public_call_once() -> None:
    """Symbol, arguments, result; what a call does inside is not heard, but a doubling is."""
    heard: list[tuple[str, tuple[Any, ...], Any]] = []
    memblock = Memblock(
        reserved_max=3, trace=lambda symbol, args, result: heard.append((symbol, args, result))
    )
    memblock.memblock_add(0, M)
    memblock.memblock_allow_resize()
    memblock.memblock_alloc(64, 64)
    memblock.memblock_reserve(PAGE, PAGE)
    memblock.memblock_reserved_mark_noinit(PAGE, PAGE)
    assert heard == [
        ("memblock_add", (0, M), 0),
        ("memblock_allow_resize", (), None),
        ("memblock_alloc_try_nid", (64, 64, 0, 0, NUMA_NO_NODE), M - 64),
        ("memblock_reserve", (PAGE, PAGE), 0),
        ("memblock_double_array", ("reserved", 6), M - 2 * PAGE),
        ("memblock_reserved_mark_noinit", (PAGE, PAGE), 0),
    ]


def test_reserve_many_refuses_nonsense() -> None:
    """Blocks that end before they start, and lists of different lengths."""
    memblock = machine()
    for count in (2, 40):
        with pytest.raises(ValueError, match=r"block \[0x2000, 0x1000\) ends before it starts"):
            memblock.memblock_reserve_many([PAGE, 2 * PAGE] * count, [2 * PAGE, PAGE] * count)
        with pytest.raises(ValueError, match="starts but"):
            memblock.memblock_reserve_many([PAGE] * count, [2 * PAGE])
    assert memblock.reserved.cnt == 0


def test_a_hundred_thousand_blocks() -> None:
    """All there, marked, counted; the array ends up as the kernel would have doubled it."""
    memblock = Memblock()
    memblock.memblock_add_node(PAGE, 64 * G, 0, 0)
    memblock.memblock_allow_resize()
    starts = [G + 4 * PAGE * k for k in range(100_000)]
    memblock.memblock_reserve_many(starts, [start + PAGE for start in starts])
    rows = memblock.reserved.rows()
    assert rows[:-1] == [(start, PAGE, MEMBLOCK_RSRV_NOINIT, NUMA_NO_NODE) for start in starts]
    assert memblock.reserved.max == 131_072
    assert rows[-1][:2] == (memblock.reserved.array_phys, 131_072 * 24)
