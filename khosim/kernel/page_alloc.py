"""The page allocator of one kernel generation.

Models ``mm/page_alloc.c`` @ 7.3: ``alloc_pages``, ``__free_pages``, what boot releases late, and
who holds which page. Scratch areas are pageblocks of type CMA, which only movable allocations may
use. Which of several free blocks is handed out is a :class:`~khosim.kernel.page_policy.Policy`.

Left out: reclaim, compaction, watermarks, per-cpu lists, GFP flags beyond movable and this-node.
"""

from __future__ import annotations

from collections.abc import Callable

from khosim.kernel.arch import Arch
from khosim.kernel.buddy import Zone
from khosim.kernel.mm_init import ZoneLayout
from khosim.kernel.page_map import ALLOCATED, INCOMING, RESERVED, PageMap, PageState
from khosim.kernel.page_policy import LinuxPolicy, Policy
from khosim.kernel.pageblock import CMA, MOVABLE, UNMOVABLE

__all__ = ("PageAllocator",)


class PageAllocator(ZoneLayout):
    """Zones, free blocks and the page map of one kernel; pfns and orders throughout.

    ``fail`` may be set to a callable ``(order, owner) -> bool``: True makes that allocation fail
    as if no memory were left.
    """

    __slots__ = ("_states", "bad_page", "fail", "nr_vmalloc", "pages", "policy")

    def __init__(self, arch: Arch, pages: PageMap, policy: Policy | None = None) -> None:
        super().__init__(arch)
        self.pages = pages
        self.policy: Policy = LinuxPolicy() if policy is None else policy
        self.fail: Callable[[int, str], bool] | None = None
        self.nr_vmalloc = 0
        """``NR_VMALLOC`` of all nodes: pages in vmalloc areas, as the kernel counts them."""
        self.bad_page: Callable[[str], None] = lambda message: None
        self._states: dict[tuple[int, bool, str], PageState] = {}

    # -- boot memory -------------------------------------------------------------------------

    def init_cma_reserved(self, start_pfn: int, end_pfn: int) -> None:
        """``init_cma_reserved_pageblock`` for a reserved range: give it to the buddy as CMA."""
        self.pageblocks.set(start_pfn, end_pfn, CMA)
        self.pages.clear(start_pfn, end_pfn)
        for low, high, zone in self.pieces_in(start_pfn, end_pfn):
            zone.cma_pages += high - low
        self._free_unmanaged(start_pfn, end_pfn, to_tail=False)

    def free_reserved(self, start_pfn: int, end_pfn: int) -> None:
        """``free_reserved_page`` for each page: reserved boot memory becomes free memory.

        A page that is free already is reported through ``bad_page`` and left where it is.
        """
        for run in self.pages.overlapping(start_pfn, end_pfn):
            self.pages.clear(run.start_pfn, run.end_pfn)
            self._free_unmanaged(run.start_pfn, run.end_pfn, to_tail=False)
            self._report_free(start_pfn, run.start_pfn)
            start_pfn = run.end_pfn
        self._report_free(start_pfn, end_pfn)

    def _report_free(self, start_pfn: int, end_pfn: int) -> None:
        for low, high, _zone in self.pieces_in(start_pfn, end_pfn):
            self.bad_page(
                f"BUG: Bad page state pfn:{low:05x}: {high - low} pages freed that are free already"
            )

    def adjust_managed_page_count(self, pfn: int, nr_pages: int) -> None:
        """``adjust_managed_page_count``: the zone of ``pfn`` manages ``nr_pages`` more."""
        zone = self.zone_of(pfn) if not self.uninitialised else self.page_zone(pfn)
        if zone is not None:
            zone.managed_pages += nr_pages

    # -- allocate ----------------------------------------------------------------------------

    def _state(self, order: int, compound: bool, owner: str) -> PageState:
        key = (order, compound, owner)
        state = self._states.get(key)
        if state is None:
            state = self._states[key] = PageState(ALLOCATED, order, compound, owner)
        return state

    def alloc_pages(
        self,
        order: int,
        owner: str,
        *,
        movable: bool = False,
        compound: bool = False,
        nid: int | None = None,
        this_node: bool = False,
    ) -> int | None:
        """``alloc_pages``: the first pfn of ``1 << order`` pages, or None when there are none.

        ``movable`` is ``GFP_MOVABLE`` (may come from scratch), ``compound`` makes a folio. There
        are none above ``MAX_PAGE_ORDER`` ever.
        """
        if self.fail is not None and self.fail(order, owner):
            return None
        zones = self._zonelists.get((nid, this_node)) or self.zonelist(nid, this_node)
        choice = self.policy.choose(zones, order, movable)
        if choice is None:
            return None
        zone, migratetype, found, block_pfn, pfn = choice
        zone.take(migratetype, found, block_pfn)
        if found >= self.arch.pageblock_order:
            migratetype = self._claim(migratetype, movable, block_pfn, 1 << found)
        if found > order:
            zone.expand(migratetype, block_pfn, found, order, pfn)
        state = self._states.get((order, compound, owner)) or self._state(order, compound, owner)
        self.pages.set(pfn, pfn + (1 << order), state)
        return pfn

    def _claim(self, migratetype: int, movable: bool, pfn: int, nr_pages: int) -> int:
        # try_to_claim_block: a fallback that takes whole pageblocks changes their type.
        if migratetype == (UNMOVABLE if movable else MOVABLE):
            migratetype = MOVABLE if movable else UNMOVABLE
            self.pageblocks.set(pfn, pfn + nr_pages, migratetype)
        return migratetype

    @property
    def bulk_is_exact(self) -> bool:
        """Whether :meth:`alloc_pages_bulk` gives the very pages that single calls would."""
        return isinstance(self.policy, LinuxPolicy)

    def alloc_pages_bulk(
        self,
        order: int,
        nr_blocks: int,
        owner: str,
        *,
        movable: bool = False,
        compound: bool = False,
        nid: int | None = None,
    ) -> list[tuple[int, int]]:
        """Allocate ``nr_blocks`` blocks of ``order`` as ``(start_pfn, nr_blocks)`` runs.

        Under the Linux policy the same pages in the same order as that many :meth:`alloc_pages`
        calls, but whole free blocks at a time; under others one legal outcome of such calls.
        Short when memory runs out; the caller frees what it got.
        """
        if self.fail is not None:
            return self._alloc_one_by_one(order, nr_blocks, owner, movable, compound, nid)
        if not isinstance(self.policy, LinuxPolicy):
            return self._alloc_in_chunks(order, nr_blocks, owner, movable, compound, nid)
        policy = self.policy
        zones = self.zonelist(nid, False)
        taken: list[tuple[int, int]] = []
        left = nr_blocks
        if not movable:
            left = self._take_small(zones[0], order, left, taken) if zones else left
        while left > 0:
            choice = policy.choose(zones, order, movable)
            if choice is None:
                break
            zone, migratetype, found, pfn, _ = choice
            extra = found - order
            count = left
            if movable or migratetype != UNMOVABLE:
                count = min(left, policy.steadiness(choice, order, movable))
            if found == zone.max_order and count >> extra:
                pfn, nr_taken = zone.pop_max_run(migratetype, count >> extra)
                self._claim(migratetype, movable, pfn, nr_taken << found)
                count = nr_taken << extra
            else:
                count = min(count, 1 << extra)
                zone.take(migratetype, found, pfn)
                if found >= self.arch.pageblock_order:
                    migratetype = self._claim(migratetype, movable, pfn, 1 << found)
                zone.keep_first(migratetype, pfn, found, count << order)
            taken.append((pfn, count))
            left -= count
        state = self._state(order, compound, owner)
        if len(taken) == 1:
            pfn, count = taken[0]
            self.pages.set(pfn, pfn + (count << order), state)
        else:
            self.pages.add_many([(pfn, pfn + (count << order), state) for pfn, count in taken])
        return taken

    def _take_small(
        self, zone: Zone, order: int, nr_blocks: int, taken: list[tuple[int, int]]
    ) -> int:
        # What LinuxPolicy would choose one by one while the first zone has unmovable blocks of less
        # than a pageblock: the smallest first. Returns how many blocks are still wanted.
        left = nr_blocks
        free = zone.free[UNMOVABLE]
        for found in range(order, min(self.arch.pageblock_order, zone.max_order)):
            blocks = free[found]
            while blocks and left:
                pfn, _ = blocks.popitem(last=False)
                zone.nr_free[UNMOVABLE] -= 1 << found
                count = 1 << (found - order)
                if count > left:
                    count = left
                    zone.keep_first(UNMOVABLE, pfn, found, count << order)
                left -= count
                if taken and taken[-1][0] + (taken[-1][1] << order) == pfn:
                    # What a block left when it was split: its neighbours, each twice as large.
                    pfn, before = taken.pop()
                    count += before
                taken.append((pfn, count))
        return left

    def _alloc_in_chunks(
        self, order: int, nr_blocks: int, owner: str, movable: bool, compound: bool, nid: int | None
    ) -> list[tuple[int, int]]:
        # Neighbours are as legal as any other choice: take the largest power of two each time.
        state = self._state(order, compound, owner)
        taken: list[tuple[int, int]] = []
        chunk = min(self.arch.max_page_order, order + nr_blocks.bit_length() - 1)
        left = nr_blocks
        while left > 0 and chunk >= order:
            if left << order < 1 << chunk:
                chunk -= 1
                continue
            pfn = self.alloc_pages(chunk, owner, movable=movable, nid=nid)
            if pfn is None:
                chunk -= 1
                continue
            self.pages.set(pfn, pfn + (1 << chunk), state)
            taken.append((pfn, 1 << (chunk - order)))
            left -= 1 << (chunk - order)
        return taken

    def _alloc_one_by_one(
        self, order: int, nr_blocks: int, owner: str, movable: bool, compound: bool, nid: int | None
    ) -> list[tuple[int, int]]:
        taken: list[tuple[int, int]] = []
        for _ in range(nr_blocks):
            pfn = self.alloc_pages(order, owner, movable=movable, compound=compound, nid=nid)
            if pfn is None:
                break
            if taken and taken[-1][0] + (taken[-1][1] << order) == pfn:
                taken[-1] = (taken[-1][0], taken[-1][1] + 1)
            else:
                taken.append((pfn, 1))
        return taken

    # -- free --------------------------------------------------------------------------------

    def free_pages(self, pfn: int, order: int) -> bool:
        """``__free_pages``: drop a reference of a block; at zero it goes back to the buddy.

        Of a block that is no folio and that somebody else refers to, all but the first page is
        freed. A page that was never handed out is left alone and reported through ``bad_page``,
        as ``free_page_is_bad`` would; returns whether the block was freed.
        """
        nr_pages = 1 << order
        run = self.pages.find(pfn)
        if run is None:
            return self._bad_free(pfn, "free")
        state = run.state
        if (
            state.kind != ALLOCATED
            or pfn & (nr_pages - 1)
            or pfn + nr_pages > run.end_pfn
            or (state.compound and state.order != order)
        ):
            return self._bad_free(pfn, state.kind)
        count = self.pages.page_count(pfn)
        if count != 1:
            if not count:
                return self._bad_free(pfn, "tail")
            if order and not state.compound:
                self._free_block(pfn + 1, pfn + nr_pages)
                self.pages.set(pfn, pfn + 1, self._state(0, False, state.owner))
            self.pages.refs[pfn] = count - 1
            return False
        self.pages.clear(pfn, pfn + nr_pages)
        zone = self.page_zone(pfn) if self.uninitialised else self.zone_of(pfn)
        if zone is None:
            return True
        if order <= self.arch.pageblock_order:
            zone.free_one_page(pfn, order, self.pageblocks.type_of(pfn))
        else:
            # split_large_buddy: each pageblock by its own type.
            size = 1 << self.arch.pageblock_order
            for at in range(pfn, pfn + nr_pages, size):
                migratetype = self.pageblocks.type_of(at)
                zone.free_one_page(at, self.arch.pageblock_order, migratetype)
        return True

    def _bad_free(self, pfn: int, kind: str) -> bool:
        self.bad_page(f"BUG: Bad page state pfn:{pfn:05x}: freeing a {kind} page")
        return False

    def free_range(self, start_pfn: int, end_pfn: int) -> None:
        """Free whole runs of allocated pages that nobody else refers to, in ascending order."""
        if start_pfn < end_pfn:
            self._free_block(start_pfn, end_pfn)

    def _free_block(self, start_pfn: int, end_pfn: int) -> None:
        self.pages.clear(start_pfn, end_pfn)
        for low, high, zone in self.pieces_in(start_pfn, end_pfn):
            for first, last, migratetype in self.pageblocks.runs(low, high):
                zone.free_range(first, last, migratetype, to_tail=False)

    def restored_state(self, order: int, compound: bool) -> PageState:
        """The state of pages that KHO just restored."""
        key = (order, compound, "kho_restore")
        return self._states.get(key) or self._state(*key)

    def split_page(self, pfn: int, order: int, owner: str) -> None:
        """``split_page``: a block becomes order-0 pages with a reference each."""
        self.pages.set(pfn, pfn + (1 << order), self._state(0, False, owner))

    def split_range(self, start_pfn: int, end_pfn: int, owner: str) -> None:
        """Free pages that were taken from the buddy become order-0 pages of ``owner``."""
        self.pages.set(start_pfn, end_pfn, self._state(0, False, owner))

    def get_page(self, pfn: int) -> None:
        """``get_page``: one more reference on the block that starts at ``pfn``.

        A page without any reference is reported through ``bad_page`` and left alone.
        """
        count = self.pages.page_count(pfn)
        if not count:
            self.bad_page(f"BUG: Bad page state pfn:{pfn:05x}: get_page without a reference")
        else:
            self.pages.refs[pfn] = count + 1

    # -- questions ---------------------------------------------------------------------------

    def nr_pages(self, *kinds: str) -> int:
        """Pages that the page map holds in one of ``kinds`` (all kinds when none is named)."""
        wanted = kinds or (RESERVED, ALLOCATED, INCOMING)
        return sum(
            run.end_pfn - run.start_pfn for run in self.pages.runs() if run.state.kind in wanted
        )
