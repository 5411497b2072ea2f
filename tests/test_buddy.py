"""Free blocks of one zone: lists worked out by hand, and a set of free pages beside them."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from khosim.kernel.buddy import CMA, MOVABLE, UNMOVABLE, Zone
from khosim.kernel.pageblock import Pageblocks

MAX_ORDER = 4
BLOCK_ORDER = 3
START, END = 5, 277
TYPES = (UNMOVABLE, MOVABLE, CMA)


def zone(end_pfn: int = END) -> Zone:
    return Zone(0, "Normal", START, end_pfn, MAX_ORDER, Pageblocks(BLOCK_ORDER, end_pfn))


def lists(of: Zone) -> dict[tuple[int, int], list[int]]:
    """The lists that are not empty: (type, order) to first pfns from head to tail."""
    found = {}
    for migratetype in TYPES:
        for order in range(MAX_ORDER + 1):
            pfns = [
                pfn + (i << order)
                for pfn, nr_blocks in of.blocks(migratetype, order)
                for i in range(nr_blocks)
            ]
            if pfns:
                found[migratetype, order] = pfns
    return found


def coarsest(free: set[int], blocks: Pageblocks) -> set[tuple[int, int, int]]:
    """The one way to cut free pages into (type, order, pfn) where all that can merge has merged."""
    whole = {(blocks.type_of(pfn), 0, pfn) for pfn in free}
    for order in range(MAX_ORDER):
        for migratetype, _, pfn in [block for block in whole if block[1] == order]:
            upper = (migratetype, order, pfn + (1 << order))
            if not pfn & (1 << order) and upper in whole:
                whole -= {(migratetype, order, pfn), upper}
                whole.add((migratetype, order + 1, pfn))
    return whole


def assert_sound(of: Zone, free: set[int]) -> None:
    """All free pages on the lists of their types, merged as far as can be, and counted."""
    listed = [(*at, pfn) for at, pfns in lists(of).items() for pfn in pfns]
    assert sorted(listed) == sorted(coarsest(free, of.pageblocks))
    nr_free = [sum(1 << order for mt, order, _ in listed if mt == one) for one in TYPES]
    assert of.nr_free == nr_free
    assert of.nr_free_pages() == len(free)
    for migratetype in TYPES:
        assert of.max_starts[migratetype] == sorted(of.max_blocks[migratetype])
        assert list(of.max_runs[migratetype]) == of.blocks(migratetype, MAX_ORDER)


class ZoneMachine(RuleBasedStateMachine):
    """A zone and the set of its free pages. Types change only where whole pageblocks merge."""

    def __init__(self) -> None:
        super().__init__()
        self.zone = zone()
        self.zone.pageblocks.set(48, 80, CMA)
        self.zone.pageblocks.set(96, 112, UNMOVABLE)
        self.free: set[int] = set()

    def type_of(self, pfn: int) -> int:
        return self.zone.pageblocks.type_of(pfn)

    @rule(start=st.integers(START, END), length=st.integers(0, 70), to_tail=st.booleans())
    def free_range(self, start: int, length: int, to_tail: bool) -> None:
        end = min(start + length, END)
        while end > start and (set(range(start, end)) & self.free):
            end -= 1
        for first, last, migratetype in self.zone.pageblocks.runs(start, end):
            self.zone.free_range(first, last, migratetype, to_tail=to_tail)
        self.free |= set(range(start, end))

    @rule(data=st.data(), order=st.integers(0, MAX_ORDER))
    def free_block(self, data: st.DataObject, order: int) -> None:
        size = 1 << order
        legal = [
            pfn
            for pfn in range(0, END, size)
            if pfn >= START
            and pfn + size <= END
            and not set(range(pfn, pfn + size)) & self.free
            and len({self.type_of(at) for at in range(pfn, pfn + size)}) == 1
        ]
        if legal:
            pfn = data.draw(st.sampled_from(legal))
            self.zone.free_one_page(pfn, order, self.type_of(pfn))
            self.free |= set(range(pfn, pfn + size))

    @precondition(lambda self: self.free)
    @rule(data=st.data(), order=st.integers(0, MAX_ORDER))
    def take_part(self, data: st.DataObject, order: int) -> None:
        pfn = data.draw(st.sampled_from(sorted(self.free))) & -(1 << order)
        found = self.zone.block_at(pfn, order, TYPES)
        holding = [
            block
            for block in coarsest(self.free, self.zone.pageblocks)
            if block[1] >= order and block[2] <= pfn < block[2] + (1 << block[1])
        ]
        assert holding == ([] if found is None else [found])
        assert self.zone.block_at(pfn, MAX_ORDER + 1, TYPES) is None
        if found is None:
            return
        migratetype, block_order, block_pfn = found
        assert self.zone.block_at(pfn, order, [t for t in TYPES if t != migratetype]) is None
        self.zone.take(migratetype, block_order, block_pfn)
        self.zone.expand(migratetype, block_pfn, block_order, order, pfn)
        self.free -= set(range(pfn, pfn + (1 << order)))

    @precondition(lambda self: self.free)
    @rule(data=st.data())
    def keep_first(self, data: st.DataObject) -> None:
        blocks = sorted(coarsest(self.free, self.zone.pageblocks))
        migratetype, order, pfn = data.draw(st.sampled_from(blocks))
        nr_pages = data.draw(st.integers(1, 1 << order))
        self.zone.take(migratetype, order, pfn)
        self.zone.keep_first(migratetype, pfn, order, nr_pages)
        self.free -= set(range(pfn, pfn + nr_pages))

    @rule(migratetype=st.sampled_from(TYPES), nr_blocks=st.integers(1, 5))
    def pop_max_run(self, migratetype: int, nr_blocks: int) -> None:
        pfns = lists(self.zone).get((migratetype, MAX_ORDER))
        if pfns:
            pfn, taken = self.zone.pop_max_run(migratetype, nr_blocks)
            assert 1 <= taken <= nr_blocks
            assert pfns[:taken] == [pfn + (i << MAX_ORDER) for i in range(taken)]
            assert lists(self.zone).get((migratetype, MAX_ORDER), []) == pfns[taken:]
            self.free -= set(range(pfn, pfn + (taken << MAX_ORDER)))

    @rule(migratetype=st.sampled_from(TYPES), order=st.integers(0, MAX_ORDER + 1))
    def pop_smallest(self, migratetype: int, order: int) -> None:
        orders = [o for mt, o in lists(self.zone) if mt == migratetype and o >= order]
        found = self.zone.smallest(migratetype, order)
        assert found == min(orders, default=None)
        if found is not None:
            head, *others = lists(self.zone)[migratetype, found]
            assert self.zone.head(migratetype, found) == head
            assert self.zone.pop(migratetype, found) == head
            assert lists(self.zone).get((migratetype, found), []) == others
            self.free -= set(range(head, head + (1 << found)))

    @invariant()
    def sound(self) -> None:
        assert_sound(self.zone, self.free)


ZoneMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=20)
TestZone = ZoneMachine.TestCase


@settings(max_examples=100)
@given(st.permutations(range(START, END)))
def test_freeing_every_page_gives_the_first_blocks_again(order: list[int]) -> None:
    """Whatever the order, single pages merge into what one range would have been."""
    whole, single = zone(), zone()
    whole.free_range(START, END, MOVABLE)
    for pfn in order:
        single.free_one_page(pfn, 0, MOVABLE)
    sort = {at: sorted(pfns) for at, pfns in lists(single).items()}
    assert sort == lists(whole)
    assert single.nr_free == whole.nr_free == [0, END - START, 0]


def test_boot_frees_the_largest_aligned_blocks_in_order() -> None:
    """5 to 149: up by alignment to the largest order, and down again at the end."""
    of = zone()
    of.free_range(START, 149, MOVABLE)
    assert lists(of) == {
        (MOVABLE, 0): [5, 148],
        (MOVABLE, 1): [6],
        (MOVABLE, 2): [144],
        (MOVABLE, 3): [8],
        (MOVABLE, 4): [16, 32, 48, 64, 80, 96, 112, 128],
    }
    assert of.blocks(MOVABLE, 4) == [(16, 8)]


def test_a_zone_may_begin_at_pfn_0() -> None:
    """pfn 0 is aligned to everything."""
    of = Zone(0, "DMA32", 0, 40, MAX_ORDER)
    of.free_range(0, 40, MOVABLE)
    assert lists(of) == {(MOVABLE, 3): [32], (MOVABLE, 4): [0, 16]}


def test_expand_leaves_the_upper_halves_at_the_heads() -> None:
    """The lowest part is handed out; each other half heads its list."""
    of = zone()
    of.free_range(16, 32, MOVABLE)
    of.free_range(68, 69, MOVABLE)
    of.take(MOVABLE, 4, 16)
    of.expand(MOVABLE, 16, 4, 0, 16)
    assert lists(of) == {
        (MOVABLE, 0): [17, 68],
        (MOVABLE, 1): [18],
        (MOVABLE, 2): [20],
        (MOVABLE, 3): [24],
    }
    of = zone()
    of.free_range(16, 32, MOVABLE)
    of.take(MOVABLE, 4, 16)
    of.expand(MOVABLE, 16, 4, 1, 26)
    assert lists(of) == {(MOVABLE, 1): [24], (MOVABLE, 2): [28], (MOVABLE, 3): [16]}


def test_freed_blocks_go_to_the_head_unless_they_will_merge() -> None:
    """buddy_merge_likely: when the pair's buddy is free, the block waits at the tail."""
    of = zone()
    of.free_one_page(40, 0, MOVABLE)
    of.free_one_page(44, 0, MOVABLE)
    assert lists(of) == {(MOVABLE, 0): [44, 40]}
    of.free_one_page(42, 1, MOVABLE)
    of.free_one_page(46, 1, MOVABLE)
    of.free_one_page(41, 0, MOVABLE)  # merges up to 40..43: its buddy 44..47 is not whole
    assert lists(of) == {(MOVABLE, 0): [44], (MOVABLE, 1): [46], (MOVABLE, 2): [40]}
    for migratetype in (UNMOVABLE, MOVABLE, CMA):
        of = zone()
        of.free_one_page(18, 1, migratetype)
        of.free_one_page(64, 0, migratetype)
        of.free_one_page(16, 0, migratetype)  # its pair 16..17 would merge with 18..19
        assert lists(of)[migratetype, 0] == [64, 16]
        of.free_one_page(17, 0, migratetype)
        assert lists(of) == {(migratetype, 0): [64], (migratetype, 2): [16]}


def test_the_last_orders_never_wait_at_the_tail() -> None:
    """A merge into the largest order is the last there is: no order beyond it to wait for."""
    of = zone()
    of.free_range(32, 48, MOVABLE)
    of.free_range(80, 88, MOVABLE)
    of.free_one_page(16, 3, MOVABLE)  # 16..32 would be the buddy of 32..48, but stays apart
    assert lists(of)[MOVABLE, 3] == [16, 80]


def test_pageblocks_of_two_types_merge_and_change() -> None:
    """The block that is freed passes its type on to the buddy; CMA does not mix."""
    of = zone()
    of.pageblocks.set(16, 24, UNMOVABLE)
    of.free_one_page(16, 3, UNMOVABLE)
    assert of.nr_free == [8, 0, 0]
    of.free_one_page(24, 3, MOVABLE)
    assert lists(of) == {(MOVABLE, 4): [16]}
    assert of.nr_free == [0, 16, 0]
    assert of.pageblocks.type_of(16) == MOVABLE
    of.pageblocks.set(32, 40, CMA)
    of.free_one_page(32, 3, CMA)
    of.free_one_page(40, 3, MOVABLE)
    of.pageblocks.set(56, 64, CMA)
    of.free_one_page(48, 3, MOVABLE)
    of.free_one_page(56, 3, CMA)
    assert lists(of) == {(MOVABLE, 3): [48, 40], (MOVABLE, 4): [16], (CMA, 3): [56, 32]}


def test_largest_blocks_keep_their_order_in_runs() -> None:
    """Head and tail as lists would have them, in as few runs as neighbours allow."""
    of = zone()
    of.free_range(48, 80, MOVABLE)
    of.free_range(96, 112, MOVABLE)
    of.free_range(112, 128, MOVABLE)
    assert of.blocks(MOVABLE, 4) == [(48, 2), (96, 2)]
    of.free_one_page(32, 4, MOVABLE)
    assert of.blocks(MOVABLE, 4) == [(32, 3), (96, 2)]
    of.free_one_page(80, 4, MOVABLE)
    assert of.blocks(MOVABLE, 4) == [(80, 1), (32, 3), (96, 2)]
    assert of.pop(MOVABLE, 4) == 80
    assert of.pop(MOVABLE, 4) == 32
    assert of.blocks(MOVABLE, 4) == [(48, 2), (96, 2)]
    of.take(MOVABLE, 4, 112)
    of.take(MOVABLE, 4, 64)
    assert lists(of) == {(MOVABLE, 4): [48, 96]}
    of.free_range(112, 176, MOVABLE)
    assert of.blocks(MOVABLE, 4) == [(48, 1), (96, 5)]
    assert of.pop(MOVABLE, 4) == 48
    of.free_range(208, 224, MOVABLE)
    of.take(MOVABLE, 4, 128)
    assert of.blocks(MOVABLE, 4) == [(96, 2), (208, 1), (144, 2)]  # the rest goes to the tail
    of.take(MOVABLE, 4, 96)
    assert of.blocks(MOVABLE, 4) == [(112, 1), (208, 1), (144, 2)]
    for pfn in (16, 64, 96, 128, 176):
        with pytest.raises(KeyError):
            of.take(MOVABLE, 4, pfn)


# -- falling back to another type ----------------------------------------------------------------


def test_a_fallback_prefers_the_largest_block() -> None:
    """__rmqueue_claim starts at the largest order, so that types stay apart."""
    of = zone()
    of.free_range(16, 32, MOVABLE)
    of.free_range(40, 41, MOVABLE)
    assert of.fallback(0, UNMOVABLE) == (MOVABLE, 4)
    assert of.fallback(4, UNMOVABLE) == (MOVABLE, 4)
    assert of.fallback(0, MOVABLE) is None
    assert lists(of) == {(MOVABLE, 0): [40], (MOVABLE, 4): [16]}


def test_unmovable_pages_claim_the_pageblock_they_break_into() -> None:
    """All free blocks of the pageblock change lists, in ascending order, to the tails."""
    of = zone()
    for pfn in (40, 42, 45):
        of.free_one_page(pfn, 0, MOVABLE)
    of.free_one_page(46, 1, MOVABLE)
    of.free_one_page(50, 0, MOVABLE)
    of.pageblocks.set(64, 72, UNMOVABLE)
    of.free_one_page(65, 0, UNMOVABLE)
    assert of.fallback(1, UNMOVABLE) == (UNMOVABLE, 1)
    assert lists(of) == {
        (UNMOVABLE, 0): [65, 40, 42, 45],
        (UNMOVABLE, 1): [46],
        (MOVABLE, 0): [50],
    }
    assert of.nr_free == [6, 1, 0]
    assert of.pageblocks.runs(START, END) == [
        (START, 40, MOVABLE),
        (40, 48, UNMOVABLE),
        (48, 64, MOVABLE),
        (64, 72, UNMOVABLE),
        (72, END, MOVABLE),
    ]


def test_movable_pages_claim_only_what_is_half_free() -> None:
    """Blocks below half the pageblock order, or pageblocks mostly in use, are stolen from."""
    of = zone()
    of.pageblocks.set(40, 48, UNMOVABLE)
    of.free_one_page(42, 1, UNMOVABLE)
    of.free_one_page(45, 0, UNMOVABLE)
    assert of.fallback(0, MOVABLE) == (UNMOVABLE, 0)  # 3 of 8 pages are free
    assert of.nr_free == [3, 0, 0]
    of.free_one_page(40, 0, UNMOVABLE)
    assert of.fallback(0, MOVABLE) == (MOVABLE, 0)  # 4 of 8
    assert lists(of) == {(MOVABLE, 0): [40, 45], (MOVABLE, 1): [42]}
    of = zone()
    of.pageblocks.set(40, 48, UNMOVABLE)
    for pfn in (40, 42, 44, 46):
        of.free_one_page(pfn, 0, UNMOVABLE)
    assert of.fallback(0, MOVABLE) == (UNMOVABLE, 0)  # order 0 is below 3 // 2
    assert of.pageblocks.type_of(40) == UNMOVABLE


def test_pageblocks_that_leave_the_zone_are_not_claimed() -> None:
    """prep_move_freepages_block: another zone's lock would be needed."""
    of = zone(end_pfn=46)
    of.free_range(44, 46, MOVABLE)
    of.free_range(6, 7, MOVABLE)
    assert of.fallback(0, UNMOVABLE) == (MOVABLE, 0)
    assert of.fallback(1, UNMOVABLE) == (MOVABLE, 1)
    assert of.fallback(2, UNMOVABLE) is None
    assert of.nr_free == [0, 3, 0]
    assert of.pageblocks.type_of(44) == MOVABLE


def test_cma_is_no_fallback() -> None:
    """Scratch is never claimed nor stolen from."""
    of = zone()
    of.pageblocks.set(16, 32, CMA)
    of.free_range(16, 32, CMA)
    assert of.fallback(0, UNMOVABLE) is None
    assert of.fallback(0, MOVABLE) is None


def test_the_block_that_holds_a_page() -> None:
    """Found on the list of its order, or in the middle of a run of largest blocks."""
    of = zone()
    of.free_range(66, 68, MOVABLE)
    of.free_range(80, 128, CMA)
    of.free_range(160, 176, CMA)
    assert of.block_at(67, 0, TYPES) == (MOVABLE, 1, 66)
    assert of.block_at(66, 1, TYPES) == (MOVABLE, 1, 66)
    assert of.block_at(67, 0, (CMA,)) is None
    assert of.block_at(65, 0, TYPES) is None
    assert of.block_at(66, 2, TYPES) is None
    assert of.block_at(117, 2, TYPES) == (CMA, 4, 112)
    assert of.block_at(128, 0, TYPES) is None
    assert of.max_run_at(CMA, 127) == (80, 3)
    assert of.max_run_at(CMA, 175) == (160, 1)


@pytest.mark.parametrize("nr_others", [0, 1, 20])
def test_claiming_where_the_list_is_long(nr_others: int) -> None:
    """The free pages of a pageblock are found in a long list as in a short one."""
    of = zone()
    for n in range(nr_others):
        of.free_one_page(64 + 2 * n, 0, MOVABLE)
    for pfn in (46, 43, 40):
        of.free_one_page(pfn, 0, MOVABLE)
    assert of.fallback(0, UNMOVABLE) == (UNMOVABLE, 0)
    assert lists(of)[UNMOVABLE, 0] == [40, 43, 46]
    assert of.nr_free == [3, nr_others, 0]
    assert of.pageblocks.runs(40, 64) == [(40, 48, UNMOVABLE), (48, 64, MOVABLE)]


def test_what_is_kept_from_a_block_leaves_the_rest_at_the_heads() -> None:
    """make_alloc_exact: the pages behind the wanted ones are freed like any other."""
    of = zone()
    for start, end in ((65, 66), (70, 72), (76, 80)):
        of.free_range(start, end, MOVABLE)
    of.free_range(16, 32, MOVABLE)
    of.take(MOVABLE, 4, 16)
    of.keep_first(MOVABLE, 16, 4, 9)
    assert lists(of) == {
        (MOVABLE, 0): [25, 65],
        (MOVABLE, 1): [26, 70],
        (MOVABLE, 2): [28, 76],
    }
    assert of.nr_free == [0, 14, 0]
