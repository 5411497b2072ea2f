"""A census of all pages of a kernel: who claims each of them, and how often.

Where the claims of free lists, page map and deferred ranges fill memory side by side, all is well.
Else they and memory itself are added up in one pass along the page frames
(:func:`khosim.checks.ranges.sweep`), each in a bit field of its own. The sum of a page tells at
once whether it is claimed once, twice or not at all. Costs what there is of blocks and runs.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import numpy as np

from khosim.checks.ranges import pairs, sweep, where

if TYPE_CHECKING:
    from collections.abc import Sequence

    from khosim.checks.kernel_view import KernelView, ZoneView
    from khosim.checks.ranges import I64, Ranges

    _Claims: TypeAlias = tuple[I64, I64, I64]
    """Starts, ends and weights."""

__all__ = ("Census", "Verdict", "take_census")

_FIELD = 0x3FF  # no page can have as many claims: each list holds it at most once
_FREE, _ALLOCATED, _DEFERRED, _RESERVED, _INCOMING = (1 << (10 * i) for i in range(5))
_MEMORY = 1 << 50
_HELD = 1 << 52
_KIND_WEIGHTS = np.array([_ALLOCATED, _RESERVED, _INCOMING], dtype=np.int64)
_NOTHING = np.empty(0, dtype=np.int64)
_MANY = 256  # blocks of one list from which numpy makes their ends


class _Kinds(dict[str, int]):
    """The index of a page's kind in the weights; what nobody knows counts as handed out."""

    def __missing__(self, kind: str) -> int:
        return 0


_KINDS = _Kinds(reserved=1, incoming=2)


class Verdict(NamedTuple):
    """What is wrong with pages of one sum; all False where each has one place."""

    twice: bool
    """Claimed by more than one."""
    lost: bool
    """Memory that nobody claims."""
    outside: bool
    """Handed out, or to be handed out, but no memory."""
    stolen: bool
    """Preserved by the predecessor and never restored, but not kept any more."""


@lru_cache(maxsize=4096)
def _verdict(level: int) -> Verdict:
    fields = [(level >> shift) & _FIELD for shift in range(0, 50, 10)]
    claims, is_memory, held = sum(fields), level >> 50 & 3, level >> 52
    return Verdict(
        twice=claims > 1,
        lost=bool(is_memory) and not claims,
        outside=not is_memory and sum(fields[:3]) > 0,
        stolen=held > 0 and not fields[4],
    )


_FINE = Verdict(False, False, False, False)


def _distinct(levels: I64) -> set[int]:
    # There are a few different sums, however many pages.
    found: set[int] = set()
    while len(levels) > _MANY and len(found) < _MANY:
        level = levels[0]
        found.add(int(level))
        levels = levels[levels != level]
    return found.union(levels.tolist())


class Census:
    """``pages(flag)`` gives the page ranges that one flag of :class:`Verdict` concerns.

    ``free_errors`` are ``(zone, migrate type, counted, listed)`` where a zone's count of free pages
    is not what its lists hold. ``managed_pages`` is what all zones say, ``found_pages`` what they
    should say: free pages and those handed out. ``strays`` are ``(zone, first pfn)`` of free blocks
    on the lists of a zone that they do not belong to.
    """

    __slots__ = (
        "_edges",
        "_levels",
        "bad",
        "found_pages",
        "free_errors",
        "managed_pages",
        "strays",
    )

    def __init__(
        self,
        managed_pages: int,
        found_pages: int,
        free_errors: list[tuple[ZoneView, int, int, int]],
        strays: list[tuple[ZoneView, int]],
    ) -> None:
        self.managed_pages = managed_pages
        self.found_pages = found_pages
        self.free_errors = free_errors
        self.strays = strays
        self.bad: dict[int, Verdict] = {}
        """What is wrong with pages of these sums."""
        self._edges = self._levels = _NOTHING

    def add_up(self, starts: I64, ends: I64, weights: I64) -> None:
        """Add up the weights of all claims, page by page, and judge the sums."""
        self._edges, self._levels = sweep(starts, ends, weights)
        self.bad = {
            level: verdict
            for level in _distinct(self._levels)
            if (verdict := _verdict(level)) != _FINE
        }

    def pages(self, flag: str) -> Ranges:
        """Ranges of page frames whose verdict has ``flag``."""
        levels = [level for level, verdict in self.bad.items() if getattr(verdict, flag)]
        return where(self._edges, np.isin(self._levels, levels))

    def has(self, flag: str) -> bool:
        """Whether any page's verdict has ``flag``."""
        return any(getattr(verdict, flag) for verdict in self.bad.values())


def take_census(
    kernel: KernelView, ram_ranges: Sequence[tuple[int, int]], page_shift: int, held: Ranges | None
) -> Census:
    """Count every page of a kernel whose page allocator is up.

    ``ram_ranges`` is the machine's RAM in bytes, ``held`` what the kernel was given and has not
    restored.
    """
    pages = kernel.pages
    map_starts, map_ends, states = pages.pages.columns()
    starts, ends = [*map_starts], [*map_ends]
    for start, end, _nid in pages.deferred:
        starts.append(start)
        ends.append(end)
    first_free = len(starts)
    parts: list[_Claims] = []
    free_errors: list[tuple[ZoneView, int, int, int]] = []
    strays: list[tuple[ZoneView, int]] = []
    managed = free = 0
    for zone in pages.zones:
        first_of_zone, first_part = len(starts), len(parts)
        for migratetype, counted in enumerate(zone.nr_free):
            listed = _add_free(zone, migratetype, starts, ends, parts)
            free += listed
            if listed != counted:
                free_errors.append((zone, migratetype, counted, listed))
        managed += zone.managed_pages
        stray = _stray(zone, starts[first_of_zone:], parts[first_part:])
        if stray is not None:
            strays.insert(0, (zone, stray))
    taken = 0
    incoming: list[tuple[int, int]] = []
    for start, end, state in zip(map_starts, map_ends, states, strict=True):
        kind = state.kind
        if kind == "incoming":
            incoming.append((start, end))
        elif kind != "reserved":
            taken += end - start
    memory = _memory(kernel, ram_ranges, page_shift)
    census = Census(managed, free + taken, free_errors, strays)
    if parts or not (_fill(starts, ends, memory) and _are_kept(held, incoming)):
        kinds = bytes(_KINDS[state.kind] for state in states)
        weights = _KIND_WEIGHTS[np.frombuffer(kinds, dtype=np.uint8)]
        counts = (first_free - len(states), len(starts) - first_free, len(memory))
        weights = np.append(weights, np.repeat((_DEFERRED, _FREE, _MEMORY), counts))
        starts += [start for start, _ in memory]
        ends += [end for _, end in memory]
        parts.append((np.array(starts, dtype=np.int64), np.array(ends, dtype=np.int64), weights))
        if held is not None:
            parts.append((held[0], held[1], np.full(len(held[0]), _HELD)))
        census.add_up(*map(np.concatenate, zip(*parts, strict=True)))
    return census


def _add_free(
    zone: ZoneView, migratetype: int, starts: list[int], ends: list[int], parts: list[_Claims]
) -> int:
    # The pages on a zone's free lists of one type; their blocks go to the lists, or many to parts.
    listed = 0
    for order, blocks in enumerate(zone.free[migratetype]):
        if not blocks:
            continue
        size, nr_blocks = 1 << order, len(blocks)
        listed += nr_blocks << order
        if nr_blocks > _MANY:
            firsts = np.fromiter(blocks, np.int64, nr_blocks)
            parts.append((firsts, firsts + size, np.full(nr_blocks, _FREE)))
        else:
            starts += blocks
            ends += [pfn + size for pfn in blocks]
    for pfn, nr_blocks in zone.max_runs[migratetype]:
        nr_pages = nr_blocks << zone.max_order
        listed += nr_pages
        starts.append(pfn)
        ends.append(pfn + nr_pages)
    return listed


def _fill(starts: list[int], ends: list[int], memory: list[tuple[int, int]]) -> bool:
    """Whether the claims fill memory and nothing else, none of them over another.

    Then nothing is wrong with any page, and who claims what need not be added up.
    """
    starts, ends = sorted(starts), sorted(ends)
    gaps = [(end, start) for start, end in zip(starts[1:], ends, strict=False) if start != end]
    borders = [(low[1], high[0]) for low, high in pairwise(memory) if low[1] != high[0]]
    return (
        gaps == borders
        and bool(memory and starts)
        and (starts[0], ends[-1]) == (memory[0][0], memory[-1][1])
        and all(end < start for end, start in gaps)
    )


def _are_kept(held: Ranges | None, incoming: list[tuple[int, int]]) -> bool:
    """Whether what the kernel has to keep is just what it holds for that."""
    if held is None or not len(held[0]):
        return True
    joined = _join(incoming)
    return len(held[0]) == len(joined) and joined == pairs(held, len(joined))


def _stray(zone: ZoneView, firsts: list[int], parts: list[_Claims]) -> int | None:
    # One block outside of the zone's pfns tells enough.
    lows = [int(part[0].min()) for part in parts]
    highs = [int(part[0].max()) for part in parts]
    if firsts:
        lows.append(min(firsts))
        highs.append(max(firsts))
    for least, most in zip(lows, highs, strict=True):
        if least < zone.start_pfn or most >= zone.end_pfn:
            return least if least < zone.start_pfn else most
    return None


def _memory(
    kernel: KernelView, ram_ranges: Sequence[tuple[int, int]], page_shift: int
) -> list[tuple[int, int]]:
    # Whole pages of each region that memblock knew, as far as there is RAM.
    slack = (1 << page_shift) - 1
    memory = kernel.memblock.memory
    found: list[tuple[int, int]] = []
    at = 0
    ram = _joined(ram_ranges)
    for base, end in zip(memory.base, memory.end, strict=True):
        while at < len(ram) and ram[at][1] <= base:
            at += 1
        i = at
        while i < len(ram) and ram[i][0] < end:
            low, high = max(base, ram[i][0]), min(end, ram[i][1])
            first, last = (low + slack) >> page_shift, high >> page_shift
            if first < last:
                found.append((first, last))
            i += 1
    return found


def _join(ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    joined: list[tuple[int, int]] = []
    for start, end in ranges:
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((start, end))
    return joined


_joined = lru_cache(maxsize=64)(_join)
