"""The page allocator beside a dictionary of who holds which page."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from khosim.kernel.arch import find_arch
from khosim.kernel.buddy import Zone
from khosim.kernel.page_alloc import PageAllocator
from khosim.kernel.page_map import ALLOCATED, INCOMING, RESERVED, PageMap, PageState
from khosim.kernel.page_policy import AdversarialPolicy, LinuxPolicy, Policy
from khosim.kernel.pageblock import CMA, MOVABLE, UNMOVABLE

MAX_ORDER = 4
BLOCK_ORDER = 3
SMALL = dataclasses.replace(
    find_arch("x86_64", 4096),
    max_page_order=MAX_ORDER,
    pageblock_order=BLOCK_ORDER,
    zone_ends_phys=(("DMA32", 100 << 12),),
)
TYPES = (UNMOVABLE, MOVABLE, CMA)
# Two nodes that meet inside a pageblock, a hole, a zone border inside a pageblock.
RANGES = [(3, 60, 0), (60, 90, 1), (96, 150, 1), (150, 203, 0)]
PAGES = {pfn for start, end, _ in RANGES for pfn in range(start, end)}
BOOT = PageState(RESERVED, 0, False, "memblock")


def bare(policy: Policy | None = None) -> tuple[PageAllocator, list[str]]:
    """An allocator that has its zones and no memory yet, and its kernel log."""
    pages = PageAllocator(SMALL, PageMap(), policy)
    pages.free_area_init(RANGES)
    log: list[str] = []
    pages.bad_page = log.append
    return pages, log


def booted(policy: Policy | None = None) -> tuple[PageAllocator, list[str]]:
    """An allocator with all memory, and its kernel log."""
    pages, log = bare(policy)
    for start, end, nid in RANGES:
        pages.memblock_free_pages(start, end, nid)
    return pages, log


def blocks_of(zone: Zone) -> list[tuple[int, int, int]]:
    """Every free block as (type, order, first pfn), sorted."""
    return sorted(
        (migratetype, order, pfn + (i << order))
        for migratetype in TYPES
        for order in range(MAX_ORDER + 1)
        for pfn, nr_blocks in zone.blocks(migratetype, order)
        for i in range(nr_blocks)
    )


def free_pages_of(zone: Zone) -> set[int]:
    return {at for _, order, pfn in blocks_of(zone) for at in range(pfn, pfn + (1 << order))}


def coarsest(free: set[int], pages: PageAllocator) -> list[tuple[int, int, int]]:
    """The one way to cut free pages into blocks where all that can merge has merged."""
    whole = {(pages.migratetype_of(pfn), 0, pfn) for pfn in free}
    for order in range(MAX_ORDER):
        for migratetype, _, pfn in [block for block in whole if block[1] == order]:
            upper = (migratetype, order, pfn + (1 << order))
            if not pfn & (1 << order) and upper in whole:
                whole -= {(migratetype, order, pfn), upper}
                whole.add((migratetype, order + 1, pfn))
    return sorted(whole)


class AllocMachine(RuleBasedStateMachine):
    """Allocations of all kinds on two nodes, beside what a page may be."""

    @initialize(policy=st.sampled_from([LinuxPolicy, lambda: AdversarialPolicy(11)]))
    def boot(self, policy: object) -> None:
        self.pages, self.log = bare(policy())  # type: ignore[operator]
        self.pages.set_cma_ranges([(66, 80), (160, 168)])
        for start, end, nid in RANGES:
            self.pages.memblock_free_pages(start, end, nid)
        self.first = [(blocks_of(zone), list(zone.nr_free)) for zone in self.pages.zones]
        self.held: dict[int, tuple[int, int]] = {}  # first pfn: order, references

    def holding(self) -> list[int]:
        return [
            at for pfn, (order, _) in self.held.items() for at in range(pfn, pfn + (1 << order))
        ]

    def zone_name(self, pfn: int) -> tuple[int, str]:
        nid = next(nid for start, end, nid in RANGES if start <= pfn < end)
        return nid, "DMA32" if pfn < 100 else "Normal"

    def got(self, pfn: int, order: int, movable: bool) -> None:
        block = set(range(pfn, pfn + (1 << order)))
        assert pfn % (1 << order) == 0
        assert not block & set(self.holding())
        assert block <= PAGES
        assert len({self.zone_name(at) for at in block}) == 1
        if not movable:
            assert not block & {*range(64, 80), *range(160, 168)}
        self.held[pfn] = (order, 1)

    @rule(
        order=st.integers(0, MAX_ORDER + 1),
        movable=st.booleans(),
        nid=st.sampled_from([None, 0, 1]),
        this_node=st.booleans(),
    )
    def alloc(self, order: int, movable: bool, nid: int | None, this_node: bool) -> None:
        compound = order > 0
        before = {pfn: self.zone_name(pfn) for z in self.pages.zones for pfn in free_pages_of(z)}
        pfn = self.pages.alloc_pages(
            order, "user", movable=movable, compound=compound, nid=nid, this_node=this_node
        )
        if pfn is None:
            size = 1 << order
            usable = {
                at
                for at, (node, _) in before.items()
                if (not this_node or node == (nid or 0))
                and (movable or self.pages.migratetype_of(at) != CMA)
            }
            places = [set(range(at, at + size)) for at in range(0, 208, size)]
            legal = [p for p in places if p <= usable and len({before[at] for at in p}) == 1]
            # Two pageblocks of which one is CMA are no block.
            legal = [
                p for p in legal if len({self.pages.migratetype_of(at) == CMA for at in p}) == 1
            ]
            assert order > MAX_ORDER or not legal
            return
        if this_node:
            assert self.zone_name(pfn)[0] == (nid or 0)
        self.got(pfn, order, movable)
        state = PageState(ALLOCATED, order, compound, "user")
        assert self.pages.pages.find(pfn).state == state  # type: ignore[union-attr]

    @rule(
        order=st.integers(0, MAX_ORDER),
        nr_blocks=st.integers(0, 40),
        movable=st.booleans(),
        fail_after=st.none() | st.integers(0, 30),
    )
    def bulk(self, order: int, nr_blocks: int, movable: bool, fail_after: int | None) -> None:
        if fail_after is not None:
            left = iter(range(fail_after))
            self.pages.fail = lambda order, owner: next(left, None) is None
        runs = self.pages.alloc_pages_bulk(
            order, nr_blocks, "user", movable=movable, compound=order > 0
        )
        self.pages.fail = None
        pfns = [pfn + (i << order) for pfn, count in runs for i in range(count)]
        for pfn in pfns:
            self.got(pfn, order, movable)
        assert len(pfns) <= min(nr_blocks, 40 if fail_after is None else fail_after)
        if len(pfns) < nr_blocks and fail_after is None:
            assert self.pages.alloc_pages(order, "user", movable=movable) is None

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def put(self, data: st.DataObject) -> None:
        pfn = data.draw(st.sampled_from(sorted(self.held)))
        order, count = self.held[pfn]
        assert self.pages.free_pages(pfn, order) == (count == 1)
        if count == 1:
            del self.held[pfn]
        else:
            self.held[pfn] = (order, count - 1)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def get(self, data: st.DataObject) -> None:
        pfn = data.draw(st.sampled_from(sorted(self.held)))
        order, count = self.held[pfn]
        self.pages.get_page(pfn)
        self.held[pfn] = (order, count + 1)

    @precondition(lambda self: any(count == 1 for _, count in self.held.values()))
    @rule(data=st.data())
    def free_neighbours(self, data: st.DataObject) -> None:
        pfn = data.draw(st.sampled_from([p for p, (_, n) in sorted(self.held.items()) if n == 1]))
        end = pfn
        while end in self.held and self.held[end][1] == 1:
            end += 1 << self.held.pop(end)[0]
        self.pages.free_range(pfn, end)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def free_wrongly(self, data: st.DataObject) -> None:
        pfn = data.draw(st.integers(0, 210))
        order = data.draw(st.integers(0, MAX_ORDER))
        if pfn in self.held or pfn % (1 << order) == 0:
            return
        assert not self.pages.free_pages(pfn, order)
        assert self.log.pop().startswith("BUG: Bad page state")

    @invariant()
    def sound(self) -> None:
        if not hasattr(self, "held"):
            return
        holding = set(self.holding())
        everything: set[int] = set()
        for zone in self.pages.zones:
            free = free_pages_of(zone)
            assert all(self.zone_name(pfn) == (zone.nid, zone.name) for pfn in free)
            assert blocks_of(zone) == coarsest(free, self.pages)
            everything |= free
            counts = [0, 0, 0]
            for migratetype, order, _ in blocks_of(zone):
                counts[migratetype] += 1 << order
            assert zone.nr_free == counts
        assert everything == PAGES - holding
        assert self.pages.nr_free_pages() == len(everything)
        assert self.pages.nr_pages() == self.pages.nr_pages(ALLOCATED) == len(holding)
        assert sum(zone.managed_pages for zone in self.pages.zones) == len(PAGES)
        for pfn, (order, count) in self.held.items():
            assert self.pages.pages.page_count(pfn) == count
            if order:
                assert self.pages.pages.page_count(pfn + 1) == 0
        assert self.log == []

    def teardown(self) -> None:
        if not hasattr(self, "held"):
            return
        for pfn, (order, count) in self.held.items():
            for _ in range(count):
                self.pages.free_pages(pfn, order)
        for zone, (blocks, nr_free) in zip(self.pages.zones, self.first, strict=True):
            # The same blocks again; only that pageblocks may have turned unmovable for good.
            now = blocks_of(zone)
            assert sorted(block[1:] for block in now) == sorted(block[1:] for block in blocks)
            assert [b for b in now if b[0] == CMA] == [b for b in blocks if b[0] == CMA]
            assert sum(zone.nr_free) == sum(nr_free)


AllocMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=20)
TestAlloc = AllocMachine.TestCase


# -- boot memory ---------------------------------------------------------------------------------


def test_reserved_memory_is_freed_as_its_pageblock_says() -> None:
    """free_reserved_page: managed from now on, and merged with what is free around it."""
    pages, log = bare()
    pages.set_cma_ranges([(160, 168)])
    pages.pages.set(152, 164, BOOT)
    pages.pages.set(30, 34, BOOT)
    for start, end in ((3, 30), (34, 60), (60, 90), (96, 150), (150, 152), (164, 203)):
        pages.memblock_free_pages(start, end, 0)
    managed = {(zone.nid, zone.name): zone.managed_pages for zone in pages.zones}
    pages.free_reserved(30, 34)
    pages.free_reserved(154, 164)
    assert log == []
    for zone in pages.zones:
        assert blocks_of(zone) == coarsest(free_pages_of(zone), pages)
        managed[zone.nid, zone.name] -= zone.managed_pages
    assert managed == {(0, "DMA32"): -4, (0, "Normal"): -10, (1, "DMA32"): 0, (1, "Normal"): 0}
    assert pages.nr_pages(RESERVED) == 2


def test_freeing_boot_memory_twice_is_reported() -> None:
    """Each stretch of pages that are free already, once; holes are nobody's."""
    pages, log = booted()
    pages.pages.set(40, 40, BOOT)
    before = [blocks_of(zone) for zone in pages.zones]
    pages.free_reserved(40, 44)
    assert log == ["BUG: Bad page state pfn:00028: 4 pages freed that are free already"]
    pages.free_reserved(90, 96)
    assert len(log) == 1
    pages.free_reserved(85, 98)
    assert log[1:] == [
        "BUG: Bad page state pfn:00055: 5 pages freed that are free already",
        "BUG: Bad page state pfn:00060: 2 pages freed that are free already",
    ]
    assert [blocks_of(zone) for zone in pages.zones] == before
    pages, log = bare()
    pages.pages.set(40, 44, BOOT)
    pages.pages.set(48, 50, BOOT)
    pages.free_reserved(38, 52)
    assert [line.split("pfn:")[1][:8] for line in log] == ["00026: 2", "0002c: 4", "00032: 2"]
    assert pages.nr_free_pages() == 6


def test_scratch_is_released_as_cma() -> None:
    """init_cma_reserved_pageblock: whole pageblocks change, counted as CMA and as managed."""
    pages, _ = bare()
    pages.pages.set(104, 120, BOOT)
    pages.memblock_free_pages(96, 104, 1)
    pages.memblock_free_pages(120, 150, 1)
    normal = next(zone for zone in pages.zones if (zone.nid, zone.name) == (1, "Normal"))
    managed = normal.managed_pages
    pages.init_cma_reserved(104, 120)
    assert normal.managed_pages == managed + 16
    assert normal.cma_pages == 16
    assert normal.nr_free == [0, 34, 16]
    assert pages.nr_pages() == 0
    assert [block for block in blocks_of(normal) if block[0] == CMA] == [
        (CMA, 3, 104),
        (CMA, 3, 112),
    ]
    assert pages.alloc_pages(3, "kernel", nid=1) not in (104, 112)
    held = {pages.alloc_pages(3, "user", movable=True, nid=1) for _ in range(9)}
    assert {104, 112} <= held
    for pfn in (104, 112):
        pages.free_pages(pfn, 3)
    assert normal.nr_free[CMA] == 16


# -- references ------------------------------------------------------------------------------------


def test_folios_are_freed_by_their_last_reference() -> None:
    """Every get needs a put."""
    pages, log = booted()
    pfn = pages.alloc_pages(2, "user", compound=True)
    assert pfn is not None
    pages.get_page(pfn)
    pages.get_page(pfn)
    assert [pages.free_pages(pfn, 2) for _ in range(3)] == [False, False, True]
    assert pages.pages.state(pfn) is None
    assert not pages.free_pages(pfn, 2)
    pages.get_page(pfn)
    assert pages.pages.refs == {}
    assert [line.split(": ")[2] for line in log] == [
        "freeing a free page",
        "get_page without a reference",
    ]


def test_pages_that_are_no_folio_lose_their_tail_at_once() -> None:
    """___free_pages: a reference held on the first page does not hold the others."""
    pages, log = booted()
    pfn = pages.alloc_pages(3, "user")
    assert pfn is not None
    pages.get_page(pfn)
    free = pages.nr_free_pages()
    assert not pages.free_pages(pfn, 3)
    assert pages.nr_free_pages() == free + 7
    assert pages.pages.page_count(pfn) == 1
    assert pages.pages.state(pfn) == PageState(ALLOCATED, 0, False, "user")
    assert pages.free_pages(pfn, 0)
    assert pages.nr_free_pages() == len(PAGES)
    assert log == []
    for zone in pages.zones:
        assert blocks_of(zone) == coarsest(free_pages_of(zone), pages)


def test_frees_that_make_no_sense_are_reported() -> None:
    """Nothing moves: tails, wrong orders, reserved, incoming and absent pages."""
    pages, log = booted()
    folio = pages.alloc_pages(2, "user", compound=True)
    plain = pages.alloc_pages(2, "user")
    assert folio is not None
    assert plain is not None
    held = [pages.alloc_pages(3, "user", movable=True) for _ in range(6)]
    even = next(pfn for pfn in held if pfn is not None and pfn % 16 == 0 and pfn + 8 not in held)
    pages.pages.set(150, 152, BOOT)
    pages.pages.set(152, 154, PageState(INCOMING, 1, False, "predecessor"))
    runs = list(pages.pages.runs())
    free = [blocks_of(zone) for zone in pages.zones]
    wrong = [
        (folio, 1),
        (folio, 0),
        (folio, 3),
        (folio + 2, 1),
        (plain + 1, 0),
        (plain, 4),
        (even, 4),
        (150, 0),
        (152, 1),
        (92, 0),
        (500, 0),
    ]
    for pfn, order in wrong:
        assert not pages.free_pages(pfn, order)
    assert len(log) == len(wrong)
    assert list(pages.pages.runs()) == runs
    assert [blocks_of(zone) for zone in pages.zones] == free


def test_a_split_block_is_freed_page_by_page() -> None:
    """split_page: every page has a reference of its own."""
    pages, log = booted()
    first = [blocks_of(zone) for zone in pages.zones]
    pfn = pages.alloc_pages(3, "user", movable=True)
    assert pfn is not None
    pages.split_page(pfn, 3, "driver")
    assert [pages.pages.page_count(pfn + i) for i in range(8)] == [1] * 8
    assert pages.pages.state(pfn + 5) == PageState(ALLOCATED, 0, False, "driver")
    for i in (3, 0, 7, 5, 1, 2, 6, 4):
        assert pages.free_pages(pfn + i, 0)
    assert [blocks_of(zone) for zone in pages.zones] == first
    assert log == []


def test_a_block_over_two_pageblocks_goes_back_by_their_types() -> None:
    """split_large_buddy: a type that was changed meanwhile counts for its pageblock alone."""
    pages, _ = booted()
    pfn = pages.alloc_pages(4, "user", movable=True, compound=True)
    assert pfn is not None
    pages.pageblocks.set(pfn, pfn + 8, CMA)
    before = sum(zone.nr_free[CMA] for zone in pages.zones)
    assert pages.free_pages(pfn, 4)
    assert sum(zone.nr_free[CMA] for zone in pages.zones) == before + 8


# -- failures and limits -------------------------------------------------------------------------


@pytest.mark.parametrize("policy", [LinuxPolicy(), AdversarialPolicy(1)])
def test_nothing_is_larger_than_the_largest_order(policy: Policy) -> None:
    """Not even when the largest blocks are neighbours."""
    pages, _ = booted(policy)
    assert pages.alloc_pages(MAX_ORDER + 1, "user") is None
    assert pages.alloc_pages_bulk(MAX_ORDER + 1, 2, "user") == []
    assert pages.nr_free_pages() == len(PAGES)
    assert pages.alloc_pages(MAX_ORDER, "user") is not None


def test_failures_are_injected_by_order_and_owner() -> None:
    """``fail`` sees each allocation, and only what it fails is missing."""
    pages, _ = booted()
    seen = []

    def fail(order: int, owner: str) -> bool:
        seen.append((order, owner))
        return owner == "unlucky"

    pages.fail = fail
    assert pages.alloc_pages(1, "unlucky") is None
    assert pages.alloc_pages(1, "lucky") is not None
    assert pages.alloc_pages_bulk(0, 3, "unlucky") == []
    assert sum(count for _, count in pages.alloc_pages_bulk(0, 3, "lucky")) == 3
    assert seen == [(1, "unlucky"), (1, "lucky"), (0, "unlucky"), *[(0, "lucky")] * 3]


def test_bulk_allocation_takes_all_there_is_and_no_more() -> None:
    """Short when memory ends: each page once, over zones and nodes."""
    for policy in (LinuxPolicy(), AdversarialPolicy(4)):
        pages, _ = booted(policy)
        runs = pages.alloc_pages_bulk(0, 1000, "user", nid=1)
        got = sorted(pfn + i for pfn, count in runs for i in range(count))
        assert got == sorted(PAGES)
        assert pages.nr_free_pages() == 0
        for pfn, count in runs:
            pages.free_range(pfn, pfn + count)
        assert pages.nr_free_pages() == len(PAGES)
        assert pages.nr_pages() == 0


def test_a_terabyte_goes_and_comes_in_runs() -> None:
    """Blocks by the million cost what a few runs cost."""
    arch = find_arch("x86_64", 4096)
    pages = PageAllocator(arch, PageMap())
    pages.free_area_init([(1 << 20, 1 << 29, 0)])
    pages.memblock_free_pages(1 << 20, 1 << 29, 0)
    pages.page_alloc_init_late()
    pages.set_cma_ranges([])
    first = blocks(pages)
    runs = pages.alloc_pages_bulk(0, (1 << 28) + 5, "user")
    assert runs == [(1 << 20, 1 << 28), ((1 << 28) + (1 << 20), 5)]
    assert pages.migratetype_of(1 << 25) == UNMOVABLE
    assert len(pages.pages) == 1
    pages.free_range(1 << 20, (1 << 20) + (1 << 28) + 5)
    assert pages.nr_free_pages() == (1 << 29) - (1 << 20)
    assert len(blocks(pages)) < 5 * len(first)


def blocks(pages: PageAllocator) -> list[tuple[int, int]]:
    return [run for mt in TYPES for order in range(11) for run in pages.zones[0].blocks(mt, order)]
