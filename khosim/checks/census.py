"""A census of all pages of a kernel: who claims each of them, and how often.

Free lists, page map, deferred ranges and memory itself are added up in one pass along the page
frames (:func:`khosim.checks.ranges.sweep`), each in a bit field of its own. The sum of a page tells
at once whether it is claimed once, twice or not at all. Costs what there is of blocks and runs.
"""

from __future__ import annotations

from functools import lru_cache
from operator import attrgetter
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from khosim.checks.ranges import sweep, where

if TYPE_CHECKING:
    from collections.abc import Sequence

    from khosim.checks.kernel_view import KernelView, ZoneView
    from khosim.checks.ranges import I64, Ranges

__all__ = ("Census", "Verdict", "take_census")

_FIELD = 0x3FF  # no page can have as many claims: each list holds it at most once
_FREE, _ALLOCATED, _DEFERRED, _RESERVED, _INCOMING = (1 << (10 * i) for i in range(5))
_MEMORY = 1 << 50
_HELD = 1 << 52
_KIND_WEIGHTS = np.array([_ALLOCATED, _RESERVED, _INCOMING], dtype=np.int64)
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
        edges: I64,
        levels: I64,
        managed_pages: int,
        found_pages: int,
        free_errors: list[tuple[ZoneView, int, int, int]],
        strays: list[tuple[ZoneView, int]],
    ) -> None:
        self.strays = strays
        self._edges = edges
        self._levels = levels
        self.managed_pages = managed_pages
        self.found_pages = found_pages
        self.free_errors = free_errors
        self.bad = {
            level: verdict for level in _distinct(levels) if (verdict := _verdict(level)) != _FINE
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
    kinds = bytes(map(_KINDS.__getitem__, map(attrgetter("kind"), states)))
    map_weights = _KIND_WEIGHTS[np.frombuffer(kinds, dtype=np.uint8)]
    nr_runs = len(starts)
    weights: list[int] = []
    for start, end, _nid in pages.deferred:
        starts.append(start)
        ends.append(end)
        weights.append(_DEFERRED)
    _add_memory(kernel, ram_ranges, page_shift, starts, ends, weights)
    nr_others = len(starts)
    parts: list[tuple[I64, I64, int]] = []
    free_errors: list[tuple[ZoneView, int, int, int]] = []
    spans: list[tuple[ZoneView, int, int, int]] = []
    managed = free = 0
    for zone in pages.zones:
        managed += zone.managed_pages
        first_of_zone, first_part = len(starts), len(parts)
        max_runs = zone.max_runs
        for migratetype, lists in enumerate(zone.free):
            listed = 0
            for order, blocks in enumerate(lists):
                if not blocks:
                    continue
                size = 1 << order
                listed += len(blocks) << order
                if len(blocks) > _MANY:
                    firsts = np.fromiter(blocks, np.int64, len(blocks))
                    parts.append((firsts, firsts + size, _FREE))
                else:
                    starts += blocks
                    ends += [pfn + size for pfn in blocks]
            for pfn, nr_blocks in max_runs[migratetype]:
                nr_pages = nr_blocks << zone.max_order
                listed += nr_pages
                starts.append(pfn)
                ends.append(pfn + nr_pages)
            free += listed
            if listed != zone.nr_free[migratetype]:
                free_errors.append((zone, migratetype, zone.nr_free[migratetype], listed))
        spans.append((zone, first_of_zone, len(starts), first_part))
    weights += [_FREE] * (len(starts) - nr_others)
    if held is not None:
        nr_held = len(held[0])
        if nr_held > _MANY:
            parts.append((held[0], held[1], _HELD))
        elif nr_held:
            starts += held[0].tolist()
            ends += held[1].tolist()
            weights += [_HELD] * nr_held
    low, high = np.array(starts, dtype=np.int64), np.array(ends, dtype=np.int64)
    weight = np.concatenate((map_weights, np.array(weights, dtype=np.int64)))
    strays = _strays(spans, low, parts)
    taken = (high[:nr_runs] - low[:nr_runs])[map_weights == _ALLOCATED]
    if parts:
        low = np.concatenate([low, *(part[0] for part in parts)])
        high = np.concatenate([high, *(part[1] for part in parts)])
        weight = np.concatenate([weight, *(np.full(len(part[0]), part[2]) for part in parts)])
    edges, levels = sweep(low, high, weight)
    return Census(edges, levels, managed, free + int(taken.sum()), free_errors, strays)


def _strays(
    spans: list[tuple[ZoneView, int, int, int]], low: I64, parts: list[tuple[I64, I64, int]]
) -> list[tuple[ZoneView, int]]:
    # spans: a zone, where its free blocks begin and end in low, and where in parts. One block
    # outside of the zone's pfns tells enough.
    found = []
    stop = len(parts)
    for zone, first, last, first_part in reversed(spans):
        blocks = [part[0] for part in parts[first_part:stop] if part[2] == _FREE]
        stop = first_part
        if first < last:
            blocks.append(low[first:last])
        for firsts in blocks:
            least, most = int(firsts.min()), int(firsts.max())
            if least < zone.start_pfn or most >= zone.end_pfn:
                found.append((zone, least if least < zone.start_pfn else most))
                break
    return found


def _add_memory(
    kernel: KernelView,
    ram_ranges: Sequence[tuple[int, int]],
    page_shift: int,
    starts: list[int],
    ends: list[int],
    weights: list[int],
) -> None:
    # Whole pages of each region that memblock knew, as far as there is RAM.
    slack = (1 << page_shift) - 1
    memory = kernel.memblock.memory
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
                starts.append(first)
                ends.append(last)
                weights.append(_MEMORY)
            i += 1


@lru_cache(maxsize=64)
def _joined(ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    joined: list[tuple[int, int]] = []
    for start, end in ranges:
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((start, end))
    return joined
