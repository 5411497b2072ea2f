"""Free memory of one zone: the buddy allocator's lists by migrate type and order.

Models ``struct zone``'s free areas and ``mm/page_alloc.c:__free_one_page``, ``expand``,
``__rmqueue_claim``, ``try_to_claim_block`` and the discipline of the lists @ 7.3. Blocks of the
largest order are kept as runs of neighbours, so that a terabyte of free memory costs as much as a
block; a run that was freed in one go is handed out in ascending order.

Left out: reclaimable and isolated pageblocks, per-cpu lists, watermarks and their boosts. All that
is allocated in a pageblock counts as unmovable when the block is to be claimed: there is no LRU.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections import OrderedDict
from collections.abc import ItemsView, Sequence

from khosim.kernel.pageblock import CMA, MIGRATE_NAMES, MOVABLE, UNMOVABLE, Pageblocks

__all__ = ("CMA", "MIGRATE_NAMES", "MOVABLE", "UNMOVABLE", "Zone")


class Zone:
    """The free blocks of one zone of one node, in pages; ``start_pfn`` and ``end_pfn`` bound it.

    The head of a list is its first element: allocation takes there and freeing adds there. Boot,
    and a block that will probably merge soon, add at the tail.
    """

    __slots__ = (
        "cma_pages",
        "end_pfn",
        "free",
        "managed_pages",
        "max_blocks",
        "max_order",
        "max_starts",
        "name",
        "nid",
        "nr_free",
        "pageblocks",
        "start_pfn",
    )

    def __init__(
        self,
        nid: int,
        name: str,
        start_pfn: int,
        end_pfn: int,
        max_order: int,
        pageblocks: Pageblocks | None = None,
    ) -> None:
        self.nid = nid
        self.name = name
        self.start_pfn = start_pfn
        self.end_pfn = end_pfn
        self.max_order = max_order
        self.managed_pages = 0
        self.cma_pages = 0
        self.pageblocks = Pageblocks(max_order, end_pfn) if pageblocks is None else pageblocks
        """Shared by all zones of a kernel."""
        self.nr_free = [0, 0, 0]
        """Free pages by migrate type."""
        self.free: list[list[OrderedDict[int, None]]] = [
            [OrderedDict() for _ in range(max_order)] for _ in MIGRATE_NAMES
        ]
        """``free[migrate type][order]``: first pfns of free blocks below the largest order."""
        self.max_blocks: list[OrderedDict[int, int]] = [OrderedDict() for _ in MIGRATE_NAMES]
        """``max_blocks[migrate type]``: first pfn of a run of largest blocks to their number."""
        self.max_starts: list[list[int]] = [[] for _ in MIGRATE_NAMES]
        """The keys of ``max_blocks``, sorted."""

    @property
    def max_runs(self) -> list[ItemsView[int, int]]:
        """By migrate type, ``(first pfn, blocks)`` of neighbouring largest blocks in list order."""
        return [runs.items() for runs in self.max_blocks]

    def nr_free_pages(self) -> int:
        """All free pages of the zone."""
        return sum(self.nr_free)

    # -- freeing -----------------------------------------------------------------------------

    def free_one_page(
        self, pfn: int, order: int, migratetype: int, *, to_tail: bool = False
    ) -> None:
        """``__free_one_page``: merge the block with free buddies and put it on its list.

        ``migratetype`` is that of the block's pageblock, or of all its pageblocks.
        """
        self.nr_free[migratetype] += 1 << order
        lists = self.free[migratetype]
        max_order = self.max_order
        pageblock_order = self.pageblocks.order
        while order < max_order:
            buddy = pfn ^ (1 << order)
            if buddy in lists[order]:
                del lists[order][buddy]
            elif order < pageblock_order or not self._adopt_buddy(buddy, order, migratetype):
                break
            pfn &= buddy
            order += 1
        else:
            self._put_max(pfn, 1, migratetype, to_tail)
            return
        blocks = lists[order]
        blocks[pfn] = None
        if not to_tail and not (
            order + 1 < max_order and self._merge_likely((pfn & buddy) ^ (2 << order), order + 1)
        ):
            blocks.move_to_end(pfn, last=False)

    def _adopt_buddy(self, buddy: int, order: int, migratetype: int) -> bool:
        # Whole pageblocks of different types merge too, except with CMA; the buddy's is changed.
        if migratetype == CMA:
            return False
        other = UNMOVABLE if migratetype == MOVABLE else MOVABLE
        blocks = self.free[other][order]
        if buddy not in blocks:
            return False
        del blocks[buddy]
        self.nr_free[other] -= 1 << order
        self.nr_free[migratetype] += 1 << order
        self.pageblocks.set(buddy, buddy + (1 << order), migratetype)
        return True

    def _merge_likely(self, higher_buddy: int, order: int) -> bool:
        # buddy_merge_likely: once its buddy is free, the pair will merge further.
        unmovable, movable, cma = self.free
        return (
            higher_buddy in movable[order]
            or higher_buddy in unmovable[order]
            or higher_buddy in cma[order]
        )

    def free_range(
        self, start_pfn: int, end_pfn: int, migratetype: int, *, to_tail: bool = True
    ) -> None:
        """``__free_pages_memory``: free a range in the largest blocks its alignment allows."""
        pfn = start_pfn
        max_order, lists = self.max_order, self.free[migratetype]
        lone = self.pageblocks.order if to_tail else 0  # below, no buddy on the list: a block alone
        while pfn < end_pfn:
            order = (pfn & -pfn).bit_length() - 1 if pfn else max_order
            if order > max_order:
                order = max_order
            size = 1 << order
            while pfn + size > end_pfn:
                order -= 1
                size >>= 1
            if order == max_order:
                nr_blocks = (end_pfn - pfn) >> order
                size *= nr_blocks
                self.nr_free[migratetype] += size
                self._put_max(pfn, nr_blocks, migratetype, to_tail)
            elif order < lone and pfn ^ size not in lists[order]:
                self.nr_free[migratetype] += size
                lists[order][pfn] = None
            else:
                self.free_one_page(pfn, order, migratetype, to_tail=to_tail)
            pfn += size

    def _put_max(self, pfn: int, nr_blocks: int, migratetype: int, to_tail: bool) -> None:
        runs, starts = self.max_blocks[migratetype], self.max_starts[migratetype]
        end_pfn = pfn + (nr_blocks << self.max_order)
        if to_tail:
            if runs:
                last = next(reversed(runs))
                if last + (runs[last] << self.max_order) == pfn:
                    runs[last] += nr_blocks
                    return
            runs[pfn] = nr_blocks
            insort(starts, pfn)
            return
        if runs and next(iter(runs)) == end_pfn:
            nr_blocks += runs.pop(end_pfn)
            starts[bisect_left(starts, end_pfn)] = pfn
        else:
            insort(starts, pfn)
        runs[pfn] = nr_blocks
        runs.move_to_end(pfn, last=False)

    # -- finding -----------------------------------------------------------------------------

    def smallest(self, migratetype: int, order: int) -> int | None:
        """The smallest order of at least ``order`` that has a free block, or None."""
        if self.nr_free[migratetype] < 1 << order:
            return None
        lists = self.free[migratetype]
        max_order = self.max_order
        for found in range(order, max_order):
            if lists[found]:
                return found
        return max_order if order <= max_order and self.max_blocks[migratetype] else None

    def head(self, migratetype: int, order: int) -> int:
        """The first pfn of the block at the head of a list that is not empty."""
        if order < self.max_order:
            return next(iter(self.free[migratetype][order]))
        return next(iter(self.max_blocks[migratetype]))

    def block_at(
        self, pfn: int, order: int, migratetypes: Sequence[int]
    ) -> tuple[int, int, int] | None:
        """The free block of at least ``order`` that holds ``pfn``: (type, order, first pfn)."""
        max_order = self.max_order
        if order > max_order:
            return None
        for migratetype in migratetypes:
            starts = self.max_starts[migratetype]
            i = bisect_right(starts, pfn) - 1
            if i >= 0 and pfn < starts[i] + (self.max_blocks[migratetype][starts[i]] << max_order):
                return migratetype, max_order, pfn & -(1 << max_order)
        for found in range(order, max_order):
            block = pfn & -(1 << found)
            for migratetype in migratetypes:
                if block in self.free[migratetype][found]:
                    return migratetype, found, block
        return None

    def blocks(self, migratetype: int, order: int) -> list[tuple[int, int]]:
        """The free blocks of one list as ``(start_pfn, nr_blocks)`` runs, in list order."""
        if order < self.max_order:
            return [(pfn, 1) for pfn in self.free[migratetype][order]]
        return list(self.max_blocks[migratetype].items())

    def fallback(self, order: int, start_type: int) -> tuple[int, int] | None:
        """``__rmqueue_claim``, then ``__rmqueue_steal``: (type, order) of a list to take from.

        Looks where the wanted type has nothing left. Claiming a pageblock moves its free blocks
        to the lists of ``start_type``; of a block of whole pageblocks the caller changes the type
        when it takes it.
        """
        other = UNMOVABLE if start_type == MOVABLE else MOVABLE
        pageblock_order = self.pageblocks.order
        # should_try_claim_block: small movable allocations rather pollute than claim.
        lowest = max(order, pageblock_order // 2) if start_type == MOVABLE else order
        for found in range(self.max_order, lowest - 1, -1):
            if not (self.free[other][found] if found < self.max_order else self.max_blocks[other]):
                continue
            if found >= pageblock_order:
                return other, found
            if self._claim_pageblock(self.head(other, found), other, start_type):
                claimed = self.smallest(start_type, order)
                assert claimed is not None
                return start_type, claimed
        stolen = self.smallest(other, order)
        return None if stolen is None else (other, stolen)

    def _claim_pageblock(self, pfn: int, old_type: int, new_type: int) -> bool:
        # try_to_claim_block below the pageblock order.
        size = 1 << self.pageblocks.order
        start, end = pfn & -size, (pfn & -size) + size
        if start < self.start_pfn or end > self.end_pfn:
            return False
        found: list[tuple[int, int]] = []
        for order in range(self.pageblocks.order):
            blocks = self.free[old_type][order]
            if len(blocks) > size >> order:
                found += [(at, order) for at in range(start, end, 1 << order) if at in blocks]
            else:
                found += [(at, order) for at in blocks if start <= at < end]
        nr_pages = sum(1 << order for _, order in found)
        if new_type == MOVABLE and nr_pages < size >> 1:
            return False
        for at, order in sorted(found):
            del self.free[old_type][order][at]
            self.free[new_type][order][at] = None
        self.nr_free[old_type] -= nr_pages
        self.nr_free[new_type] += nr_pages
        self.pageblocks.set(start, end, new_type)
        return True

    # -- taking ------------------------------------------------------------------------------

    def pop(self, migratetype: int, order: int) -> int:
        """Take the block at the head of a list that is not empty; returns its first pfn."""
        pfn = self.head(migratetype, order)
        self.take(migratetype, order, pfn)
        return pfn

    def pop_max_run(self, migratetype: int, nr_blocks: int) -> tuple[int, int]:
        """Take up to ``nr_blocks`` neighbours of the largest order: (first pfn, blocks)."""
        pfn = next(iter(self.max_blocks[migratetype]))
        taken = min(self.max_blocks[migratetype][pfn], nr_blocks)
        self.take_max(migratetype, pfn, taken)
        return pfn, taken

    def max_run_at(self, migratetype: int, pfn: int) -> tuple[int, int]:
        """The run of free largest blocks that holds ``pfn``: (first pfn, blocks)."""
        starts = self.max_starts[migratetype]
        start = starts[bisect_right(starts, pfn) - 1]
        return start, self.max_blocks[migratetype][start]

    def take(self, migratetype: int, order: int, pfn: int) -> None:
        """Take the free block of ``order`` that starts at ``pfn``, wherever it stands."""
        if order < self.max_order:
            del self.free[migratetype][order][pfn]
            self.nr_free[migratetype] -= 1 << order
        else:
            self.take_max(migratetype, pfn, 1)

    def take_max(self, migratetype: int, pfn: int, nr_blocks: int) -> None:
        """Take ``nr_blocks`` free blocks of the largest order from ``pfn`` on."""
        # What is left behind the blocks of a run stays at the head, or goes to the tail.
        runs, starts = self.max_blocks[migratetype], self.max_starts[migratetype]
        i = bisect_right(starts, pfn) - 1
        start = starts[i] if i >= 0 else pfn
        before = (pfn - start) >> self.max_order
        after = runs[start] - before - nr_blocks
        if after < 0:
            raise KeyError(pfn)
        was_head = next(iter(runs)) == start
        if before:
            runs[start] = before
        else:
            del runs[start], starts[i]
        if after:
            rest = pfn + (nr_blocks << self.max_order)
            runs[rest] = after
            starts.insert(i + (before > 0), rest)
            if was_head and not before:
                runs.move_to_end(rest, last=False)
        self.nr_free[migratetype] -= nr_blocks << self.max_order

    def expand(self, migratetype: int, pfn: int, order: int, wanted: int, chosen: int) -> None:
        """Split a taken block of ``order`` until ``chosen`` is left; free the other halves.

        ``expand`` in Linux always keeps the lowest part (``chosen == pfn``).
        """
        lists = self.free[migratetype]
        self.nr_free[migratetype] += (1 << order) - (1 << wanted)
        while order > wanted:
            order -= 1
            upper = pfn + (1 << order)
            if chosen >= upper:
                spare, pfn = pfn, upper
            else:
                spare = upper
            blocks = lists[order]
            if blocks:
                blocks[spare] = None
                blocks.move_to_end(spare, last=False)
            else:
                blocks[spare] = None

    def keep_first(self, migratetype: int, pfn: int, order: int, nr_pages: int) -> None:
        """Keep the first ``nr_pages`` of a taken block and free the rest, as single pages would."""
        end_pfn = pfn + (1 << order)
        pfn += nr_pages
        self.nr_free[migratetype] += end_pfn - pfn
        while pfn < end_pfn:
            order = (pfn & -pfn).bit_length() - 1
            blocks = self.free[migratetype][order]
            blocks[pfn] = None
            blocks.move_to_end(pfn, last=False)
            pfn += 1 << order
