"""The memory map: what ``struct page`` says of every page that is not free.

Models the fields of ``struct page`` that a handover depends on (``include/linux/mm_types.h``,
``mm/mm_init.c:__init_single_page`` @ 7.3): reference count, reserved flag, compound head and tail
with order, ``private``. Pages that no run covers are free in the buddy allocator, not yet
initialised, or no memory at all; :mod:`khosim.kernel.page_alloc` knows which.

State is kept as sorted runs of equal blocks, so a terabyte in one state costs as much as a page.
Blocks are naturally aligned: in a run of order *n* the head pages are those whose pfn is a multiple
of ``1 << n``. Left out: mapcount, LRU links, ``page_type`` and all flags but the reserved one.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from operator import itemgetter
from typing import NamedTuple

__all__ = (
    "ALLOCATED",
    "INCOMING",
    "KHO_PAGE_MAGIC",
    "RESERVED",
    "PageMap",
    "PageRun",
    "PageState",
)

KHO_PAGE_MAGIC = 0x4B484F50

RESERVED = "reserved"
"""PageReserved, as ``memmap_init_reserved_range`` leaves it: every page has refcount 1."""
ALLOCATED = "allocated"
"""Handed out by the page allocator or restored by KHO: the head page has refcount 1."""
INCOMING = "incoming"
"""Preserved by the predecessor and not yet restored: noinit, magic and order in ``private``."""


class PageState(NamedTuple):
    """What all blocks of a run share. ``owner`` is the kernel symbol or user that holds them."""

    kind: str
    order: int
    compound: bool
    owner: str


class PageRun(NamedTuple):
    """Pages ``[start_pfn, end_pfn)`` in one state."""

    start_pfn: int
    end_pfn: int
    state: PageState


class PageMap:
    """All runs of one kernel generation, sorted and disjoint; pfns and orders throughout."""

    __slots__ = ("_ends", "_starts", "_states", "private", "refs")

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []
        self._states: list[PageState] = []
        self.private: dict[int, int] = {}
        """``page->private`` where it differs from what the run implies."""
        self.refs: dict[int, int] = {}
        """``page_count`` where it differs from what the run implies."""

    def __len__(self) -> int:
        return len(self._starts)

    def runs(self) -> Iterator[PageRun]:
        """Every run, in ascending order."""
        return map(PageRun, self._starts, self._ends, self._states)

    def columns(self) -> tuple[list[int], list[int], list[PageState]]:
        """First pfns, ends and states of all runs, as they are kept: not to be changed."""
        return self._starts, self._ends, self._states

    def find(self, pfn: int) -> PageRun | None:
        """The run that covers ``pfn``, or None."""
        i = bisect_right(self._starts, pfn) - 1
        if i >= 0 and pfn < self._ends[i]:
            return PageRun(self._starts[i], self._ends[i], self._states[i])
        return None

    def state(self, pfn: int) -> PageState | None:
        """The state of the run that covers ``pfn``, or None."""
        i = bisect_right(self._starts, pfn) - 1
        if i >= 0 and pfn < self._ends[i]:
            return self._states[i]
        return None

    def overlapping(self, start_pfn: int, end_pfn: int) -> list[PageRun]:
        """The parts of all runs that lie in ``[start_pfn, end_pfn)``, ascending."""
        i = bisect_right(self._starts, start_pfn) - 1
        if i < 0 or self._ends[i] <= start_pfn:
            i += 1
        found = []
        while i < len(self._starts) and self._starts[i] < end_pfn:
            found.append(
                PageRun(
                    max(self._starts[i], start_pfn), min(self._ends[i], end_pfn), self._states[i]
                )
            )
            i += 1
        return found

    def gaps(self, start_pfn: int, end_pfn: int) -> list[tuple[int, int]]:
        """The parts of ``[start_pfn, end_pfn)`` that no run covers, ascending."""
        free = []
        at = start_pfn
        for run in self.overlapping(start_pfn, end_pfn):
            if run.start_pfn > at:
                free.append((at, run.start_pfn))
            at = run.end_pfn
        if at < end_pfn:
            free.append((at, end_pfn))
        return free

    def set(self, start_pfn: int, end_pfn: int, state: PageState) -> None:
        """Put pages ``[start_pfn, end_pfn)`` into ``state``, whatever they were."""
        if start_pfn >= end_pfn:
            return
        starts, ends, states = self._starts, self._ends, self._states
        i = bisect_left(starts, start_pfn)
        after = starts[i] if i < len(starts) else end_pfn + 1
        before = ends[i - 1] if i else -1
        if after == start_pfn and ends[i] == end_pfn:
            # The very run that is there, as for a block that is restored.
            if self.private:
                self._forget(self.private, start_pfn, end_pfn)
            if self.refs:
                self._forget(self.refs, start_pfn, end_pfn)
            after = starts[i + 1] if i + 1 < len(starts) else end_pfn + 1
            if (before != start_pfn or states[i - 1] != state) and (
                after != end_pfn or states[i + 1] != state
            ):
                states[i] = state
                return
            del starts[i], ends[i], states[i]
        elif before > start_pfn or after < end_pfn:
            self.clear(start_pfn, end_pfn)
            i = bisect_left(starts, start_pfn)
            after = starts[i] if i < len(starts) else end_pfn + 1
            before = ends[i - 1] if i else -1
        joins_right = after == end_pfn and states[i] == state
        if before == start_pfn and states[i - 1] == state:
            if joins_right:
                ends[i - 1] = ends[i]
                del starts[i], ends[i], states[i]
            else:
                ends[i - 1] = end_pfn
        elif joins_right:
            starts[i] = start_pfn
        else:
            starts.insert(i, start_pfn)
            ends.insert(i, end_pfn)
            states.insert(i, state)

    def clear(self, start_pfn: int, end_pfn: int) -> None:
        """Forget pages ``[start_pfn, end_pfn)``: they go to the buddy allocator."""
        if start_pfn >= end_pfn:
            return
        starts, ends, states = self._starts, self._ends, self._states
        if self.private:
            self._forget(self.private, start_pfn, end_pfn)
        if self.refs:
            self._forget(self.refs, start_pfn, end_pfn)
        first = bisect_right(starts, start_pfn) - 1
        if first >= 0 and end_pfn <= ends[first]:
            # Fast path: inside one run, which is what freeing a block always finds.
            if ends[first] > end_pfn:
                if starts[first] == start_pfn:
                    starts[first] = end_pfn
                    return
                starts.insert(first + 1, end_pfn)
                ends.insert(first, start_pfn)
                states.insert(first, states[first])
            elif starts[first] == start_pfn:
                del starts[first], ends[first], states[first]
            else:
                ends[first] = start_pfn
            return
        if first < 0 or ends[first] <= start_pfn:
            first += 1
        last = bisect_left(starts, end_pfn, first)
        if first < last:
            keep: list[tuple[int, int, PageState]] = []
            if starts[first] < start_pfn:
                keep.append((starts[first], start_pfn, states[first]))
            if ends[last - 1] > end_pfn:
                keep.append((end_pfn, ends[last - 1], states[last - 1]))
            starts[first:last] = [run[0] for run in keep]
            ends[first:last] = [run[1] for run in keep]
            states[first:last] = [run[2] for run in keep]

    @staticmethod
    def _forget(sparse: dict[int, int], start_pfn: int, end_pfn: int) -> None:
        if end_pfn - start_pfn < len(sparse):
            for pfn in range(start_pfn, end_pfn):
                sparse.pop(pfn, None)
        else:
            for pfn in [pfn for pfn in sparse if start_pfn <= pfn < end_pfn]:
                del sparse[pfn]

    def add_many(self, runs: list[tuple[int, int, PageState]]) -> None:
        """Add many runs that overlap neither each other nor what is here; sorted or not."""
        if len(runs) < 64:
            self.set_each(runs)
            return
        merged = sorted(
            [*zip(self._starts, self._ends, self._states, strict=True), *runs],
            key=itemgetter(0),
        )
        starts: list[int] = []
        ends: list[int] = []
        states: list[PageState] = []
        for start_pfn, end_pfn, state in merged:
            if ends and ends[-1] == start_pfn and states[-1] == state:
                ends[-1] = end_pfn
            elif start_pfn < end_pfn:
                starts.append(start_pfn)
                ends.append(end_pfn)
                states.append(state)
        self._starts, self._ends, self._states = starts, ends, states

    def set_each(self, runs: Iterable[tuple[int, int, PageState]]) -> None:
        """:meth:`set` of each run; fastest where they ascend behind all that is here."""
        starts, ends, states = self._starts, self._ends, self._states
        for start_pfn, end_pfn, state in runs:
            last = ends[-1] if ends else -1
            if start_pfn < last or start_pfn >= end_pfn:
                self.set(start_pfn, end_pfn, state)
            elif start_pfn == last and states[-1] == state:
                ends[-1] = end_pfn
            else:
                starts.append(start_pfn)
                ends.append(end_pfn)
                states.append(state)

    def page_count(self, pfn: int) -> int:
        """``page_count``: 1 for a reserved or incoming page and for the head of a block."""
        if pfn in self.refs:
            return self.refs[pfn]
        state = self.state(pfn)
        if state is None:
            return 0
        if state.kind == ALLOCATED and pfn & ((1 << state.order) - 1):
            return 0
        return 1

    def page_private(self, pfn: int, magic: int) -> int:
        """``page->private``: ``magic << 32 | order`` on the head of an incoming block, else 0."""
        if pfn in self.private:
            return self.private[pfn]
        state = self.state(pfn)
        if state is None or state.kind != INCOMING or pfn & ((1 << state.order) - 1):
            return 0
        return magic << 32 | state.order
