"""The Linux policy beside the kernel's own steps, the adversarial one beside the law."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from khosim.kernel.arch import find_arch
from khosim.kernel.buddy import Zone
from khosim.kernel.page_alloc import PageAllocator
from khosim.kernel.page_map import PageMap
from khosim.kernel.page_policy import AdversarialPolicy, LinuxPolicy, Policy
from khosim.kernel.pageblock import CMA, MOVABLE, UNMOVABLE

MAX_ORDER = 4
BLOCK_ORDER = 3
SMALL = dataclasses.replace(
    find_arch("x86_64", 4096),
    max_page_order=MAX_ORDER,
    pageblock_order=BLOCK_ORDER,
    zone_ends_phys=(),
)
TYPES = (UNMOVABLE, MOVABLE, CMA)
RANGES = [(3, 60), (64, 150)]


def allocator(
    policy: Policy | None = None,
    ranges: list[tuple[int, int]] = RANGES,
    cma: list[tuple[int, int]] | None = None,
    arch: object = SMALL,
) -> PageAllocator:
    pages = PageAllocator(arch, PageMap(), policy)  # type: ignore[arg-type]
    pages.free_area_init((start, end, 0) for start, end in ranges)
    pages.set_cma_ranges(cma or [])
    for start, end in ranges:
        pages.memblock_free_pages(start, end, 0)
    return pages


def lists(zone: Zone) -> dict[tuple[int, int], list[int]]:
    """The lists that are not empty: (type, order) to first pfns from head to tail."""
    found = {}
    for migratetype in TYPES:
        for order in range(zone.max_order + 1):
            runs = zone.blocks(migratetype, order)
            pfns = [pfn + (i << order) for pfn, nr_blocks in runs for i in range(nr_blocks)]
            if pfns:
                found[migratetype, order] = pfns
    return found


class PlainLinux:
    """One zone as the kernel keeps it: a list for each type and order, types of pageblocks."""

    def __init__(self, ranges: list[tuple[int, int]], cma: list[tuple[int, int]]) -> None:
        self.start, self.end = ranges[0][0], ranges[-1][1]
        self.types = [MOVABLE] * ((self.end >> BLOCK_ORDER) + 1)
        for start, end in cma:
            for pfn in range(start, end):
                self.types[pfn >> BLOCK_ORDER] = CMA
        self.lists: dict[tuple[int, int], list[int]] = {
            (mt, order): [] for mt in TYPES for order in range(MAX_ORDER + 1)
        }
        self.buddies: dict[int, int] = {}
        for pfn, end in ranges:
            while pfn < end:
                order = min(MAX_ORDER, (pfn & -pfn).bit_length() - 1)
                while pfn + (1 << order) > end:
                    order -= 1
                self.free(pfn, order, to_tail=True)
                pfn += 1 << order

    def type_of(self, pfn: int) -> int:
        return self.types[pfn >> BLOCK_ORDER]

    def set_types(self, pfn: int, order: int, migratetype: int) -> None:
        for at in range(pfn, pfn + (1 << order), 1 << BLOCK_ORDER):
            self.types[at >> BLOCK_ORDER] = migratetype

    def nr_free(self, *types: int) -> int:
        return sum(len(pfns) << order for (mt, order), pfns in self.lists.items() if mt in types)

    def free(self, pfn: int, order: int, *, to_tail: bool = False) -> None:
        size = 1 << min(order, BLOCK_ORDER)
        for at in range(pfn, pfn + (1 << order), size):
            self.free_one(at, min(order, BLOCK_ORDER), to_tail)

    def free_one(self, pfn: int, order: int, to_tail: bool) -> None:
        migratetype = self.type_of(pfn)
        while order < MAX_ORDER:
            buddy = pfn ^ (1 << order)
            if self.buddies.get(buddy) != order:
                likely = order < MAX_ORDER - 1
                pair = pfn & buddy
                if likely and self.buddies.get(pair ^ (2 << order)) == order + 1:
                    to_tail = True
                break
            theirs = self.type_of(buddy)
            if order >= BLOCK_ORDER and theirs != migratetype and CMA in (theirs, migratetype):
                break
            del self.buddies[buddy]
            self.lists[theirs, order].remove(buddy)
            if theirs != migratetype:
                self.set_types(buddy, order, migratetype)
            pfn &= buddy
            order += 1
        self.buddies[pfn] = order
        self.lists[migratetype, order].insert(10_000 if to_tail else 0, pfn)

    def take(self, pfn: int, order: int, high: int, old: int, new: int) -> int:
        self.lists[old, high].remove(pfn)
        del self.buddies[pfn]
        while high > order:
            high -= 1
            self.lists[new, high].insert(0, pfn + (1 << high))
            self.buddies[pfn + (1 << high)] = high
        return pfn

    def smallest(self, order: int, migratetype: int) -> int | None:
        for high in range(order, MAX_ORDER + 1):
            if self.lists[migratetype, high]:
                pfn = self.lists[migratetype, high][0]
                return self.take(pfn, order, high, migratetype, migratetype)
        return None

    def claim(self, order: int, start: int, other: int) -> int | None:
        for high in range(MAX_ORDER, order - 1, -1):
            if high < BLOCK_ORDER // 2 and start == MOVABLE:
                return None
            if not self.lists[other, high]:
                continue
            pfn = self.lists[other, high][0]
            if high >= BLOCK_ORDER:
                self.set_types(pfn, high, start)
                return self.take(pfn, order, high, other, start)
            first = pfn & -(1 << BLOCK_ORDER)
            last = first + (1 << BLOCK_ORDER)
            if first < self.start or last > self.end:
                continue
            blocks = [(at, self.buddies[at]) for at in range(first, last) if at in self.buddies]
            nr_free = sum(1 << one for _, one in blocks)
            alike = 0 if start == MOVABLE else (1 << BLOCK_ORDER) - nr_free
            if nr_free + alike >= 1 << BLOCK_ORDER - 1:
                for at, one in blocks:
                    self.lists[other, one].remove(at)
                    self.lists[start, one].append(at)
                self.set_types(first, BLOCK_ORDER, start)
                return self.smallest(order, start)
        return None

    def alloc(self, order: int, movable: bool) -> int | None:
        start, other = (MOVABLE, UNMOVABLE) if movable else (UNMOVABLE, MOVABLE)
        found = None
        if movable and self.nr_free(CMA) > self.nr_free(*TYPES) // 2:
            found = self.smallest(order, CMA)
        if found is None:
            found = self.smallest(order, start)
        if found is None and movable:
            found = self.smallest(order, CMA)
        if found is None:
            found = self.claim(order, start, other)
        return self.smallest(order, other) if found is None else found


orders = st.integers(0, MAX_ORDER) | st.just(0)


class LinuxMachine(RuleBasedStateMachine):
    """The allocator and the plain kernel through the same calls: the same pages, the same lists."""

    @initialize(cma=st.sampled_from([[], [(80, 96)], [(64, 72), (104, 128)], [(16, 128)]]))
    def boot(self, cma: list[tuple[int, int]]) -> None:
        self.pages = allocator(LinuxPolicy(), cma=cma)
        self.plain = PlainLinux(RANGES, cma)
        self.held: list[tuple[int, int]] = []

    @rule(order=orders | st.just(MAX_ORDER + 1), movable=st.booleans())
    def alloc(self, order: int, movable: bool) -> None:
        pfn = self.pages.alloc_pages(order, "user", movable=movable, compound=order > 0)
        assert pfn == self.plain.alloc(order, movable)
        if pfn is not None:
            self.held.append((pfn, order))

    @rule(order=orders, nr_blocks=st.integers(0, 60), movable=st.booleans())
    def alloc_bulk(self, order: int, nr_blocks: int, movable: bool) -> None:
        runs = self.pages.alloc_pages_bulk(
            order, nr_blocks, "user", movable=movable, compound=order > 0
        )
        got = [pfn + (i << order) for pfn, count in runs for i in range(count)]
        expected = []
        while len(expected) < nr_blocks:
            pfn = self.plain.alloc(order, movable)
            if pfn is None:
                break
            expected.append(pfn)
        assert got == expected
        self.held += [(pfn, order) for pfn in got]

    @precondition(lambda self: self.held)
    @rule(data=st.data(), nr_blocks=st.integers(1, 20))
    def free(self, data: st.DataObject, nr_blocks: int) -> None:
        for _ in range(min(nr_blocks, len(self.held))):
            pfn, order = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
            assert self.pages.free_pages(pfn, order)
            self.plain.free(pfn, order)

    @invariant()
    def same_lists(self) -> None:
        if hasattr(self, "plain"):
            assert lists(self.pages.zones[0]) == {
                at: pfns for at, pfns in self.plain.lists.items() if pfns
            }
            types = [self.pages.migratetype_of(at << 3) for at in range(len(self.plain.types))]
            assert types == self.plain.types
            nr_free = [self.plain.nr_free(migratetype) for migratetype in TYPES]
            assert self.pages.zones[0].nr_free == nr_free


LinuxMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=16)
TestLinux = LinuxMachine.TestCase


def test_movable_pages_keep_cma_at_half_of_what_is_free() -> None:
    """CMA first while it holds more than half, then both in turns; the last resort of a zone."""
    pages = allocator(ranges=[(0, 64)], cma=[(0, 40)])
    # CMA: 40 of 64 pages, 36 of 60, 32 of 56, 28 of 52, then 24 of 48 is no more than half.
    singles = [pages.alloc_pages(2, "user", movable=True) for _ in range(6)]
    assert singles == [32, 36, 0, 4, 40, 8]
    pages = allocator(ranges=[(0, 64)], cma=[(0, 40)])
    runs = pages.alloc_pages_bulk(2, 6, "user", movable=True)
    assert runs == [(32, 2), (0, 2), (40, 1), (8, 1)]
    pages.alloc_pages_bulk(2, 9, "user", movable=True)
    assert pages.zones[0].nr_free == [0, 0, 4]


def test_unmovable_pages_never_come_from_cma() -> None:
    """When nothing else is left there is nothing left."""
    for policy in (LinuxPolicy(), AdversarialPolicy(1)):
        pages = allocator(policy, ranges=[(0, 64)], cma=[(0, 48)])
        got = {pages.alloc_pages(0, "kernel") for _ in range(16)}
        assert got == set(range(48, 64))
        assert pages.alloc_pages(0, "kernel") is None
        assert pages.alloc_pages_bulk(0, 3, "kernel") == []
        assert pages.alloc_pages(0, "user", movable=True) is not None


def test_a_zone_is_used_up_before_the_next() -> None:
    """Claiming and stealing in the first zone come before the wanted type of the second."""
    arch = dataclasses.replace(SMALL, zone_ends_phys=(("DMA32", 64 << 12),))
    pages = allocator(ranges=[(0, 128)], arch=arch)
    assert [zone.name for zone in pages.zones] == ["DMA32", "Normal"]
    pfns = [pages.alloc_pages(3, "kernel") for _ in range(8)]
    assert sorted(pfns) == list(range(64, 128, 8))  # type: ignore[type-var]
    assert pages.alloc_pages(3, "kernel") == 0
    assert pages.alloc_pages(3, "user", movable=True) == 16


# -- adversarial ---------------------------------------------------------------------------------


def legal_places(pages: PageAllocator, order: int, movable: bool) -> set[int]:
    """Every aligned block of pages that are all free and all of a permitted type."""
    types = (UNMOVABLE, MOVABLE, CMA) if movable else (UNMOVABLE, MOVABLE)
    free = set()
    for zone in pages.zones:
        for (migratetype, high), pfns in lists(zone).items():
            if migratetype in types and high >= order:
                for pfn in pfns:
                    free |= set(range(pfn, pfn + (1 << high)))
    size = 1 << order
    return {pfn for pfn in range(0, 256, size) if set(range(pfn, pfn + size)) <= free}


@pytest.mark.parametrize("movable", [False, True])
@pytest.mark.parametrize("order", [0, 1, 3, 4, 5])
def test_every_legal_place_can_be_chosen(order: int, movable: bool) -> None:
    """On a small zone with gaps, each free place comes, and no other."""
    arch = dataclasses.replace(SMALL, zone_ends_phys=(("DMA32", 64 << 12),))
    pages = allocator(AdversarialPolicy(5), cma=[(80, 96)], arch=arch)
    for _ in range(14):
        pages.alloc_pages(1, "kernel")
        pages.alloc_pages(0, "user", movable=True)
    legal = legal_places(pages, order, movable)
    zones = pages.zonelist(None, False)
    chosen = set()
    for _ in range(6000):
        choice = pages.policy.choose(zones, order, movable)
        if choice is None:
            break
        zone, migratetype, found, block_pfn, pfn = choice
        assert block_pfn in lists(zone)[migratetype, found]
        assert block_pfn <= pfn <= pfn + (1 << order) <= block_pfn + (1 << found)
        chosen.add(pfn)
    assert chosen == legal
    assert bool(legal) == (order <= MAX_ORDER)


def test_the_last_free_page_is_found() -> None:
    """However few places are left among many, an allocation does not fail for bad luck."""
    pages = allocator(AdversarialPolicy(2), ranges=[(0, 4096)])
    assert sum(count for _, count in pages.alloc_pages_bulk(0, 4096, "user")) == 4096
    for pfn in (77, 4000):
        pages.free_pages(pfn, 0)
    assert {pages.alloc_pages(0, "user"), pages.alloc_pages(0, "user")} == {77, 4000}
    assert pages.alloc_pages(0, "user") is None


def test_many_small_blocks_are_all_within_reach() -> None:
    """Also those in the middle of a long list."""
    pages = allocator(AdversarialPolicy(2), ranges=[(0, 512)])
    pages.alloc_pages_bulk(0, 512, "user")
    for pfn in range(0, 512, 2):
        pages.free_pages(pfn, 0)
    zones = pages.zonelist(None, False)
    chosen = {pages.policy.choose(zones, 0, False) for _ in range(8000)}
    assert {choice[4] for choice in chosen if choice} == set(range(0, 512, 2))


def test_the_seed_decides() -> None:
    """Equal seeds make equal choices, others do not; the seed is all that counts."""

    def story(policy: Policy) -> list[object]:
        pages = allocator(policy, cma=[(80, 96)])
        told: list[object] = [pages.alloc_pages_bulk(1, 12, "user", movable=True)]
        for i in range(60):
            pfn = pages.alloc_pages(i % 4, "user", movable=i % 3 == 0)
            told.append(pfn)
            if pfn is not None and i % 2:
                pages.free_pages(pfn, i % 4)
        return told

    assert story(AdversarialPolicy(7)) == story(AdversarialPolicy(7))
    assert story(AdversarialPolicy(7)) != story(AdversarialPolicy(8))
    assert story(LinuxPolicy()) == story(LinuxPolicy())


def test_no_zones_no_pages() -> None:
    """A node without memory, asked for its own."""
    for policy in (LinuxPolicy(), AdversarialPolicy(1)):
        assert policy.choose([], 0, False) is None


def test_adversarial_allocations_claim_whole_pageblocks() -> None:
    """A fallback into whole pageblocks changes their type, as it does in Linux."""
    changed: Callable[[PageAllocator], list[int]] = lambda pages: [  # noqa: E731
        pfn for pfn in range(0, 128, 8) if pages.migratetype_of(pfn) == UNMOVABLE
    ]
    pages = allocator(AdversarialPolicy(3), ranges=[(0, 128)])
    pfn = pages.alloc_pages(0, "kernel")
    assert pfn is not None
    assert changed(pages) == [pfn & -16, (pfn & -16) + 8]
