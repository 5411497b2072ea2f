"""Which of several free blocks an allocation gets.

Models ``mm/page_alloc.c:get_page_from_freelist`` and ``__rmqueue`` @ 7.3 as :class:`LinuxPolicy`:
the first zone, the smallest block of the wanted type, CMA for movable pages when it holds more than
half of the zone's free memory or nothing else is left, then claiming and stealing from the other
type. :class:`AdversarialPolicy` shows what else the rules permit.

Left out: watermarks and reserves, per-cpu lists, ``ALLOC_NOFRAGMENT`` (a zone is used up to its
last fragment before the next one is asked), shuffled free lists.
"""

from __future__ import annotations

from itertools import islice
from random import Random
from typing import Protocol

from khosim.kernel.buddy import Zone
from khosim.kernel.pageblock import CMA, MOVABLE, UNMOVABLE

__all__ = ("AdversarialPolicy", "Choice", "LinuxPolicy", "Policy")

Choice = tuple[Zone, int, int, int, int]
"""``(zone, migrate type, block order, block pfn, chosen pfn)``."""

_MOVABLE_TYPES = (MOVABLE, UNMOVABLE, CMA)
_UNMOVABLE_TYPES = (MOVABLE, UNMOVABLE)
_TRIES = 4
_NEAR_ENDS = 32


class Policy(Protocol):
    """Chooses the free block for an allocation.

    The block is still on the list of its migrate type; the chosen pfn is the part to hand out.
    """

    def choose(self, zones: list[Zone], order: int, movable: bool) -> Choice | None:
        """Pick from ``zones`` (in the zone list's order) a block of at least ``order``."""
        ...


class LinuxPolicy:
    """The block that ``rmqueue`` takes: first zone, smallest order, head of the list."""

    __slots__ = ()

    def choose(self, zones: list[Zone], order: int, movable: bool) -> Choice | None:
        """See :class:`Policy`. May claim a pageblock, as ``__rmqueue`` does."""
        for zone in zones:
            if movable:
                nr_free = zone.nr_free
                # __rmqueue: keep CMA and the rest of the zone in balance.
                if nr_free[CMA] * 2 > sum(nr_free):
                    migratetype, second = CMA, MOVABLE
                else:
                    migratetype, second = MOVABLE, CMA
                found = zone.smallest(migratetype, order)
                if found is None:
                    migratetype = second
                    found = zone.smallest(migratetype, order)
            else:
                if order < zone.max_order and (exact := zone.free[UNMOVABLE][order]):
                    pfn = next(iter(exact))
                    return zone, UNMOVABLE, order, pfn, pfn
                migratetype = UNMOVABLE
                found = zone.smallest(UNMOVABLE, order)
            if found is None:
                other = zone.fallback(order, MOVABLE if movable else UNMOVABLE)
                if other is None:
                    continue
                migratetype, found = other
            blocks = zone.max_blocks[migratetype]
            pfn = next(iter(zone.free[migratetype][found] if found < zone.max_order else blocks))
            return zone, migratetype, found, pfn, pfn
        return None

    def steadiness(self, choice: Choice, order: int, movable: bool) -> int:
        """How many allocations like this one the chosen list serves before another is asked.

        Valid while the list lasts: movable pages turn to and from CMA to keep the balance, and a
        block that is stolen from makes the kernel look for a pageblock to claim again.
        """
        zone, migratetype, found, _, _ = choice
        if migratetype == (UNMOVABLE if movable else MOVABLE) and found < zone.pageblocks.order:
            return 1
        surplus = 2 * zone.nr_free[CMA] - sum(zone.nr_free)
        if not movable or (migratetype == CMA) != (surplus > 0):
            return 1 << 62
        return -(-surplus >> order) if surplus > 0 else (-surplus >> order) + 1


class AdversarialPolicy:
    """Any block that Linux could legally have handed out, drawn from ``seed``.

    Every zone of the zone list, every permitted migrate type, every free block large enough and
    every aligned part of it can be the answer. Half of the draws are even over all of a zone's
    free memory, the others prefer the short lists, where pages that were just freed are.
    """

    __slots__ = ("_random",)

    def __init__(self, seed: int) -> None:
        self._random = Random(seed).random

    def choose(self, zones: list[Zone], order: int, movable: bool) -> Choice | None:
        """See :class:`Policy`."""
        if not zones:
            return None
        random = self._random
        types = _MOVABLE_TYPES if movable else _UNMOVABLE_TYPES
        zone = zones[int(random() * len(zones))]
        if random() < 0.5:
            first = -(-zone.start_pfn >> order)
            nr_places = (zone.end_pfn >> order) - first
            for _ in range(_TRIES):
                pfn = (first + int(random() * nr_places)) << order
                block = zone.block_at(pfn, order, types)
                if block is not None:
                    return (zone, *block, pfn)
        else:
            lists = self._lists([zone], order, types)
            if lists:
                return self._from_list(*lists[int(random() * len(lists))], order)
        lists = self._lists(zones, order, types)
        if not lists:
            return None
        zone, migratetype, found = lists[int(random() * len(lists))]
        if found == zone.max_order:
            return self._from_list(zone, migratetype, found, order)
        blocks = zone.free[migratetype][found]
        block_pfn = next(islice(blocks, int(random() * len(blocks)), None))
        return zone, migratetype, found, block_pfn, self._part(block_pfn, found, order)

    @staticmethod
    def _lists(
        zones: list[Zone], order: int, types: tuple[int, ...]
    ) -> list[tuple[Zone, int, int]]:
        lists = []
        for zone in zones:
            max_order = zone.max_order
            if order > max_order:
                continue
            for migratetype in types:
                if zone.nr_free[migratetype] >= 1 << order:
                    free = zone.free[migratetype]
                    lists += [
                        (zone, migratetype, found)
                        for found in range(order, max_order)
                        if free[found]
                    ]
                    if zone.max_blocks[migratetype]:
                        lists.append((zone, migratetype, max_order))
        return lists

    def _from_list(self, zone: Zone, migratetype: int, found: int, order: int) -> Choice:
        # From either end of a list; of the largest blocks any run and any of its blocks.
        random = self._random
        if found == zone.max_order:
            starts = zone.max_starts[migratetype]
            start = starts[int(random() * len(starts))]
            nr_blocks = zone.max_blocks[migratetype][start]
            block_pfn = start + (int(random() * nr_blocks) << found)
        else:
            blocks = zone.free[migratetype][found]
            skip = int(random() * min(len(blocks), 2 * _NEAR_ENDS))
            ends = blocks if skip < _NEAR_ENDS else reversed(blocks)
            block_pfn = next(islice(ends, skip % _NEAR_ENDS, None))
        return zone, migratetype, found, block_pfn, self._part(block_pfn, found, order)

    def _part(self, block_pfn: int, found: int, order: int) -> int:
        return block_pfn + (int(self._random() * (1 << (found - order))) << order)
